"""FCOS of the published MSAD code: its head, and what is detected from recorded outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import nn

from d2_distill.apps.conversion.msad import head_names

from ..cases import Case
from ..dispatch import assert_close, assert_recorded
from ..openmmlab import build_given, given_run

# Of the published detector, below MODEL.FCOS.
MSAD_FCOS = {
    "DISTANCES": "relu",
    "CENTERNESS_ON": "box",
    "TOWER_BIAS": True,
    "PREDICTOR_BIAS": False,
    "INFERENCE": "adelaidet",
    "IOU_OFFSET": 1.0,
}


def msad_fcos(
    strides: Sequence[int], settings: Mapping[str, Any], maps: Sequence[torch.Tensor] = (), **test: Any
) -> nn.Module:
    """The published form of the detector.

    Args:
        settings: config keys below MODEL.FCOS.
        test: config keys below TEST.
    """
    bounds = [64.0 * 2**level for level in range(len(strides) - 1)]
    keys = {"SIZES_OF_INTEREST": bounds, **MSAD_FCOS, **settings}
    return build_given(
        "OpenMMLabFCOS", strides, {f"FCOS.{key}": value for key, value in keys.items()}, maps=maps, test=test
    )


def maps_of(case: Case, name: str) -> list[torch.Tensor]:
    """Recorded maps ``<name>_<level>``."""
    count = sum(key.startswith(f"{name}_") and key[len(name) + 1 :].isdigit() for key in case.arrays)
    return [case.tensor(f"{name}_{level}") for level in range(count)]


def unshared(state: Mapping[str, torch.Tensor], num_shared: int, per_block: int) -> dict[str, torch.Tensor]:
    """The blocks that both towers share, before each of them; a block has so many layers."""
    result = {}
    for name, value in state.items():
        tower, _, rest = name.partition(".")
        if tower == "share_tower":
            result[f"cls_tower.{rest}"] = result[f"bbox_tower.{rest}"] = value
            continue
        if tower.endswith("_tower"):
            layer, _, kind = rest.partition(".")
            name = f"{tower}.{int(layer) + per_block * num_shared}.{kind}"
        result[name] = value
    return result


def check_head(case: Case) -> None:
    params, maps = case.data["params"], maps_of(case, "x")
    shared, own = params["num_share_convs"], params["num_cls_convs"]
    assert own == params["num_box_convs"] and maps[0].shape[1] == params["channels"]
    model = msad_fcos(
        [8 * 2**level for level in range(len(maps))],
        {"NUM_CLASSES": params["num_classes"], "NUM_CONVS": shared + own, "NORM": params["norm"]},
        maps,
    )
    assert (model.head.scales is not None) == params["use_scale"]
    state = {key[2:]: case.tensor(key).float() for key in case.arrays if key.startswith("w.")}
    assert set(state) == set(case.data["state_dict_keys"])
    model.head.load_state_dict(head_names(unshared(state, shared, 3 if params["norm"] else 2)))
    with torch.no_grad():
        outputs = dict(zip(model.head.predictors, model.head(maps)))
    for level in range(len(maps)):
        assert_recorded(case, f"logits_{level}", outputs["logits"][level])
        # Here the decoding of boxes clamps them.
        assert_recorded(case, f"reg_{level}", outputs["deltas"][level].relu())
        assert_recorded(case, f"ctr_{level}", outputs["centerness"][level])


def check_detect(case: Case) -> None:
    params = case.data["params"]
    recorded = {"logits": "logits", "deltas": "reg", "centerness": "ctr"}
    predictions = {output: maps_of(case, name) for output, name in recorded.items()}
    model = msad_fcos(
        list(params["strides"]),
        {
            "NUM_CLASSES": params["num_classes"],
            "SCORE_THRESH_TEST": params["pre_nms_thresh"],
            "TOPK_CANDIDATES_TEST": params["pre_nms_topk"],
            "NMS_THRESH_TEST": params["nms_thresh"],
            "THRESH_WITH_CTR": params["thresh_with_ctr"],
        },
        DETECTIONS_PER_IMAGE=params["post_nms_topk"],
    )
    sizes = [tuple(size) for size in params["image_sizes"]]
    run = given_run(model, predictions, sizes)
    images = ImageList.from_tensors([torch.zeros(3, *size) for size in sizes])
    found = model.forward_inference(images, list(run.features.values()), list(predictions.values()))
    for index, (detections, size) in enumerate(zip(found, sizes)):
        assert detections.image_size == size
        assert len(detections) == case.data["num_detections"][index]
        expected = {name: case.tensor(f"{name}_{index}") for name in ("boxes", "scores", "classes")}
        ours = {
            "boxes": detections.pred_boxes.tensor,
            "scores": detections.scores,
            "classes": detections.pred_classes,
        }
        assert (detections.scores.diff() <= 0).all()
        assert_same_rows(case, index, ours, expected)
        assert_locations(case, index, run)


def assert_same_rows(case: Case, image: int, actual: dict, expected: dict) -> None:
    """Detections of one image, as sets: rows of equal score have no order, nor have those without NMS."""
    ordered = []
    for rows in (actual, expected):
        table = torch.cat([rows["scores"][:, None], rows["classes"][:, None].float(), rows["boxes"]], dim=1)
        # By rounded values, which the tolerance does not make cross a boundary, lexicographically.
        keys = sorted(range(len(table)), key=lambda row: [round(x, 2) for x in table[row].double().tolist()])
        ordered.append(table[keys])
    assert_close(case, f"image {image}", *ordered)


def assert_locations(case: Case, image: int, run) -> None:
    """Each recorded detection is what is decoded at the recorded location."""
    centers = run.grid.centers
    decoded = run.staged.decode(run.grid, run.outputs["deltas"])[image]
    locations = case.tensor(f"locations_{image}")
    at = (locations[:, None] == centers).all(dim=-1)
    assert (at.sum(dim=1) == 1).all()
    rows = at.float().argmax(dim=1)
    assert_close(case, f"locations of image {image}", decoded[rows], case.tensor(f"boxes_{image}"))


CHECKS = {"head": check_head, "detect": check_detect}
