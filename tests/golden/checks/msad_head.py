"""FCOS of the published MSAD code: its head, and what is detected from recorded outputs."""

from __future__ import annotations

import torch
from detectron2.structures import ImageList

from d2_distill.apps.conversion.msad import head_names
from d2_distill.detectors import OpenMMLabFCOS
from d2_distill.detectors.box_coders import DistanceCoder

from ..cases import Case
from ..dispatch import assert_close, assert_recorded
from ..openmmlab import build_detector

NUM_LEVELS = 5


def msad_fcos(maps: list[torch.Tensor], strides: list[int], num_classes: int, **options) -> OpenMMLabFCOS:
    """The published form of the detector over the given maps."""
    head = {"centerness_on": "box", "tower_bias": True, "predictor_bias": False, **options.pop("head", {})}
    return build_detector(
        OpenMMLabFCOS,
        maps,
        strides,
        num_classes,
        assigner=None,
        box_coder=DistanceCoder("relu"),
        inference="adelaidet",
        head=head,
        **options,
    )


def maps_of(case: Case, name: str) -> list[torch.Tensor]:
    return [case.tensor(f"{name}_{level}") for level in range(NUM_LEVELS)]


def unshared(state: dict[str, torch.Tensor], num_shared: int) -> dict[str, torch.Tensor]:
    """The blocks that both towers share, in front of each of them."""
    result = {}
    for name, value in state.items():
        tower, _, rest = name.partition(".")
        if tower == "share_tower":
            result[f"cls_tower.{rest}"] = result[f"bbox_tower.{rest}"] = value
            continue
        if tower.endswith("_tower"):
            layer, _, kind = rest.partition(".")
            name = f"{tower}.{int(layer) + 3 * num_shared}.{kind}"
        result[name] = value
    return result


def check_head(case: Case) -> None:
    params, maps = case.data["params"], maps_of(case, "x")
    shared, own = params["num_share_convs"], params["num_cls_convs"]
    assert own == params["num_box_convs"] and params["use_scale"]
    model = msad_fcos(
        maps, [8, 16, 32, 64, 128], params["num_classes"], num_convs=shared + own, norm=params["norm"]
    )
    state = {key[2:]: case.tensor(key).float() for key in case.arrays if key.startswith("w.")}
    model.head.load_state_dict(head_names(unshared(state, shared)))
    with torch.no_grad():
        outputs = dict(zip(model.head.predictors, model.head(maps)))
    for level in range(NUM_LEVELS):
        assert_recorded(case, f"logits_{level}", outputs["logits"][level])
        # Here the decoding of boxes clamps them.
        assert_recorded(case, f"reg_{level}", outputs["deltas"][level].relu())
        assert_recorded(case, f"ctr_{level}", outputs["centerness"][level])


def check_detect(case: Case) -> None:
    params = case.data["params"]
    logits = maps_of(case, "logits")
    model = msad_fcos(
        logits,
        params["strides"],
        params["num_classes"],
        test_score_thresh=params["pre_nms_thresh"],
        test_topk_candidates=params["pre_nms_topk"],
        test_nms_thresh=params["nms_thresh"],
        max_detections_per_image=params["post_nms_topk"],
        thresh_with_ctr=params["thresh_with_ctr"],
        head={"norm": ""},
    )
    images = ImageList.from_tensors([torch.zeros(3, *size) for size in params["image_sizes"]])
    predictions = [logits, maps_of(case, "reg"), maps_of(case, "ctr")]
    found = model.forward_inference(images, logits, predictions)
    for index, (detections, size) in enumerate(zip(found, params["image_sizes"])):
        assert detections.image_size == tuple(size)
        assert len(detections) == case.data["num_detections"][index]
        recorded = {name: case.tensor(f"{name}_{index}") for name in ("boxes", "scores", "classes")}
        ours = {
            "boxes": detections.pred_boxes.tensor,
            "scores": detections.scores,
            "classes": detections.pred_classes,
        }
        assert (detections.scores.diff() <= 0).all()
        assert_same_rows(case, index, ours, recorded)


def assert_same_rows(case: Case, image: int, actual: dict, expected: dict) -> None:
    """Detections of one image, as sets: rows of equal score have no order, nor have those without NMS."""
    ordered = []
    for rows in (actual, expected):
        table = torch.cat([rows["scores"][:, None], rows["classes"][:, None].float(), rows["boxes"]], dim=1)
        # By rounded values, which the tolerance does not make cross a boundary, lexicographically.
        keys = sorted(range(len(table)), key=lambda row: [round(x, 2) for x in table[row].double().tolist()])
        ordered.append(table[keys])
    assert_close(case, f"image {image}", *ordered)


CHECKS = {"head": check_head, "detect": check_detect}
