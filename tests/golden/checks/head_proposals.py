"""The student as region proposal network: positions, proposals, sampling, gathering, and its pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.apps.conversion.openmmlab import Tensors, pyramid
from d2_distill.assistants.proposals import DenseProposer, gather_positions, has_position, with_ground_truth
from d2_distill.backbones.pyramid import build_pyramid
from d2_distill.config.keys import get_distill_cfg
from d2_distill.staged import DenseRun

from .. import openmmlab
from ..cases import Case
from ..dispatch import assert_close, assert_recorded
from .crosskd_losses import delta_transform
from .head_basics import level_names


def proposer_of(options) -> DenseProposer:
    """Of a recorded ``proposal_cfg``."""
    cfg = get_cfg()
    openmmlab.set_keys(cfg, {
        "RPN.PRE_NMS_TOPK_TRAIN": options["nms_pre"],
        "RPN.POST_NMS_TOPK_TRAIN": options["max_per_img"],
        "RPN.NMS_THRESH": options["nms_iou"],
        "PROPOSAL_GENERATOR.MIN_SIZE": options["min_bbox_size"],
    })
    return DenseProposer.from_cfg(cfg)


def in_recorded_positions(model: nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """Positions (level, y, x, anchor) with the recorded index of the anchor."""
    return torch.cat([positions[:, :3], openmmlab.recorded_anchors(model)[positions[:, 3:]]], dim=1)


def all_positions(run: DenseRun) -> Sequence[torch.Tensor]:
    """Positions of all anchors of an image, a level each: what is proposed if every box stays.

    Its logits put the proposals in the order of the anchors.
    """
    counts = openmmlab.level_sizes(run)
    ranks = torch.arange(float(sum(counts))).neg().split(counts)
    run.outputs = {
        "logits": [x[None, :, None] for x in ranks],
        "deltas": [x.new_zeros(1, len(x), 4) for x in ranks],
    }
    proposer = DenseProposer(max(counts), sum(counts), nms_thresh=1.0, min_box_size=-1)
    (proposals,) = proposer.propose(run)
    return proposals.positions.split(counts)


def blank_run(model: nn.Module, grids: Sequence[Sequence[int]]) -> DenseRun:
    """A run over grids of the given sizes."""
    maps = [torch.zeros(1, model.head.cls_score.out_channels, *grid) for grid in grids]
    size = [side * model.backbone.output_shape()["p0"].stride for side in grids[0]]
    return openmmlab.given_run(model, {"logits": maps}, [size])


def check_anchors(case: Case) -> None:
    data = case.data
    strides, grids, names = list(data["strides"]), list(data["sizes"]), level_names(case, "anchors_")
    settings = openmmlab.anchor_settings(
        strides,
        data["octave_base_scale"],
        data["scales_per_octave"],
        data["ratios"],
        offset=float(data["center_offset"]),
    )
    model = openmmlab.build_given("OpenMMLabRetinaNet", strides, {"RETINANET.NUM_CLASSES": 1, **settings})
    assert openmmlab.num_sizes_and_ratios(model) == (data["scales_per_octave"], len(data["ratios"]))
    run = blank_run(model, grids)
    per_cell = model.anchor_generator.num_anchors[0]
    cells = zip(model.anchor_generator.cell_anchors, strides)
    for name, anchors, positions, (base, stride) in zip(names, run.anchors, all_positions(run), cells):
        recorded = {
            key: openmmlab.in_our_order(model, case.tensor(f"{key}_{name}").unflatten(0, (-1, per_cell)), dim=1)
            for key in ("anchors", "pos", "base_anchors")
        }
        assert_close(case, f"anchors_{name}", anchors.tensor, recorded["anchors"].flatten(0, 1))
        assert_close(case, f"base_anchors_{name}", base + data["center_offset"] * stride, recorded["base_anchors"][0])
        assert torch.equal(in_recorded_positions(model, positions).float(), recorded["pos"].flatten(0, 1))


def check_proposals(case: Case) -> None:
    data, names = case.data, level_names(case, "cls_logits_")
    logits, deltas = ([case.tensor(f"{key}_{name}") for name in names] for key in ("cls_logits", "deltas"))
    assert data["channel_layout"] == (
        "channel index of the logits = anchor*num_classes + class; of the deltas = anchor*4 + coordinate (dx dy dw dh)"
    )
    coder = delta_transform(list(data["delta_means"]), list(data["delta_stds"]), data["wh_ratio_clip"])
    strides = list(data["strides"])
    model = openmmlab.build_given("OpenMMLabRetinaNet", strides, {
        "RETINANET.NUM_CLASSES": data["num_classes"],
        "RETINANET.BBOX_REG_WEIGHTS": coder.weights,
        **openmmlab.anchor_settings(strides, **openmmlab.RETINANET_ANCHORS),
    })
    assert model.box_coder.transform.scale_clamp == pytest.approx(coder.scale_clamp)
    assert logits[0].shape[1] == model.anchor_generator.num_anchors[0] * model.num_classes
    run = openmmlab.given_run(model, {"logits": logits, "deltas": deltas}, list(data["img_shapes"]))
    scores = assert_proposals(case, run, lambda positions: in_recorded_positions(model, positions))
    assert data["order"] == "descending score" and all((of_image.diff() <= 0).all() for of_image in scores)


def check_fcos_proposals(case: Case) -> None:
    """Both forms of the distances, which are recorded in pixels; the centerness is there to be ignored."""
    strides, names = list(case.data["strides"]), level_names(case, "cls_logits_")
    maps = {
        key: [case.tensor(f"{key}_{name}") for name in names] for key in ("cls_logits", "distances", "centerness")
    }
    forms = {
        "exp": [x.log() for x in maps["distances"]],
        "relu": [x / stride for x, stride in zip(maps["distances"], strides)],
    }
    for form, deltas in forms.items():
        model = openmmlab.build_given("OpenMMLabFCOS", strides, {
            "FCOS.NUM_CLASSES": case.data["num_classes"],
            "FCOS.DISTANCES": form,
            "FCOS.SIZES_OF_INTEREST": [64.0 * 2**level for level in range(len(strides) - 1)],
        })
        predictions = {"logits": maps["cls_logits"], "deltas": deltas, "centerness": maps["centerness"]}
        run = openmmlab.given_run(model, predictions, list(case.data["img_shapes"]))
        assert_proposals(case, run, lambda positions: positions)
    for level, (name, anchors) in enumerate(zip(names, run.anchors)):
        assert_recorded(case, f"points_{name}", anchors.get_centers())
    run = blank_run(model, [x.shape[-2:] for x in maps["cls_logits"]])
    for name, positions in zip(names, all_positions(run)):
        assert_recorded(case, f"pos_{name}", positions)


def assert_proposals(
    case: Case, run: DenseRun, recorded_positions: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """The proposals are the recorded ones; returns the scores of each image."""
    found = proposer_of(case.data["proposal_cfg"]).propose(run)
    scores = []
    for image, proposals in enumerate(found):
        scores.append(proposals.objectness_logits.sigmoid())
        positions = recorded_positions(proposals.positions).float()
        columns = [proposals.proposal_boxes.tensor, scores[-1][:, None], positions]
        assert_recorded(case, f"proposals_{image}", torch.cat(columns, dim=1))
    return scores


def sample(case: Case, pool: Instances, truth: Instances, num_classes: int, size: int, fraction: float) -> Instances:
    """What the assistant's RoI heads draw from the pool of an image, its index in the pool included.

    They have one threshold for low-quality matches, which they do not make.
    """
    data, cfg = case.data, get_cfg()
    is_split = data["neg_iou"] < data["pos_iou"]
    assert data["neg_iou"] <= data["pos_iou"]
    openmmlab.set_keys(cfg, {
        "ROI_HEADS.IN_FEATURES": ["p3"],
        "ROI_HEADS.NUM_CLASSES": num_classes,
        "ROI_HEADS.PROPOSAL_APPEND_GT": False,
        "ROI_HEADS.BATCH_SIZE_PER_IMAGE": size,
        "ROI_HEADS.POSITIVE_FRACTION": fraction,
        "ROI_HEADS.IOU_THRESHOLDS": [data["neg_iou"], data["pos_iou"]] if is_split else [data["pos_iou"]],
        "ROI_HEADS.IOU_LABELS": [0, -1, 1] if is_split else [0, 1],
        "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "ROI_BOX_HEAD.NUM_FC": 1,
    })
    roi_heads = StandardROIHeads(cfg, {"p3": ShapeSpec(channels=1, stride=8)})
    assert roi_heads.proposal_matcher.allow_low_quality_matches == data["match_low_quality"]
    pool.pool_index = torch.arange(len(pool))
    with EventStorage():
        (sampled,) = roi_heads.label_and_sample_proposals([pool], [truth])
    return sampled[sampled.pool_index.argsort()]


def check_sampling(case: Case) -> None:
    """Which of a pool that does not fit into the sample are drawn is left to chance; how many is not."""
    data, sampler = case.data, case.data["sampler"]
    assert not data["match_low_quality"] and data["randomness"] == (
        "none when the pool fits; otherwise treat pos_inds/neg_inds as given and check counts, order and ids"
    )
    # Without low-quality matches no box needs a lowest IoU for them.
    case.skip("min_pos_iou")
    boxes, classes = case.tensor("gt_boxes"), case.tensor("gt_labels")
    truth = openmmlab.instances_of((1000, 1000), boxes, classes)
    pool = Instances(
        truth.image_size,
        proposal_boxes=Boxes(case.tensor("proposals")),
        objectness_logits=torch.zeros(len(case.tensor("proposals"))),
        positions=case.tensor("proposal_ids").long(),
    )
    if sampler["add_gt"]:
        (pool,) = with_ground_truth([pool], [truth])

    numbered = openmmlab.instances_of(truth.image_size, boxes, torch.arange(len(boxes)))
    whole = sample(case, pool, numbered, len(boxes), len(pool), 1.0)
    assert len(whole) == len(pool)
    assigned = torch.where(whole.gt_classes == len(boxes), 0, whole.gt_classes + 1)
    assert_recorded(case, "assigned_gt", assigned)

    num_classes = int(classes.max()) + 1
    sampled = sample(case, pool, truth, num_classes, sampler["num"], sampler["pos_fraction"])
    positive, negative = case.tensor("pos_inds"), case.tensor("neg_inds")
    is_positive = sampled.gt_classes < num_classes
    assert [int(is_positive.sum()), int((~is_positive).sum())] == [len(positive), len(negative)]
    matched = assigned[sampled.pool_index] - 1
    assert torch.equal(sampled.gt_classes[is_positive], classes[matched[is_positive]])
    assert torch.equal(sampled.gt_boxes.tensor[is_positive], boxes[matched[is_positive]])
    if len(sampled) == len(pool):
        assert_recorded(case, "pos_inds", sampled.pool_index[is_positive])
        assert_recorded(case, "neg_inds", sampled.pool_index[~is_positive])
    rows = torch.cat([positive, negative])
    assert_recorded(case, "sampled_boxes", pool.proposal_boxes.tensor[rows])
    assert_recorded(case, "sampled_ids", pool.positions[rows])
    assert_recorded(case, "pos_is_gt", ~has_position([pool.positions[positive]]))
    assert_recorded(case, "pos_assigned_gt", assigned[positive] - 1)
    assert not assigned[negative].any()


def check_gather(case: Case) -> None:
    """With a stride, positions are those of maps of so many times the size."""
    ids = {name: case.tensor("roi_ids").long()[:, column] for column, name in enumerate(case.data["roi_id_columns"])}
    cells = [ids[axis].div(case.data["stride"], rounding_mode="floor") for axis in ("y", "x")]
    positions = torch.stack([ids["level"], *cells, ids["anchor"]], dim=1)
    maps = [case.tensor(f"feat_{name}") for name in level_names(case, "feat_")]
    images = ids["image"]
    per_image = [positions[images == image] for image in range(len(maps[0]))]
    # The recorded rows are not sorted by image.
    order = images.argsort(stable=True)
    kept = has_position(per_image)
    back = order[kept].argsort()
    rows = torch.cat(per_image)[kept][back]
    assert_recorded(case, "gathered", gather_positions(maps, per_image)[back])
    assert_recorded(case, "kept_row_features", case.tensor("row_features")[order][kept][back])
    assert_recorded(case, "anchor_ids", rows[:, 3])
    level, y, x, _ = rows.unbind(dim=1)
    assert_recorded(case, "positions", torch.stack([level, images[order][kept][back], y, x], dim=1))


class _Stages(Backbone):
    """Recorded maps as the stages of a ResNet, from res2 on."""

    def __init__(self, maps: list[torch.Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.output_shape(), self.maps))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"res{stage}": ShapeSpec(channels=maps.shape[1], stride=2**stage)
            for stage, maps in enumerate(self.maps, start=2)
        }


def check_fpn(case: Case) -> None:
    weights = {f"neck.{key[len('w.') :]}": case.tensor(key) for key in case.arrays if key.startswith("w.")}
    state, settings = pyramid(Tensors(weights, "the recording"), two_stage=False)
    cfg = get_distill_cfg()
    openmmlab.set_keys(cfg, settings, "")
    stages = sorted(key for key in case.arrays if key.startswith("c"))
    fpn = build_pyramid(cfg, _Stages([case.tensor(key) for key in stages]))
    fpn.load_state_dict({name[len("backbone.") :]: value for name, value in state.items()})
    maps = fpn(case.tensor(stages[0]))
    assert list(maps) == level_names(case, "")
    for name, features in maps.items():
        assert_recorded(case, name, features)


CHECKS = {
    "anchors_pos": check_anchors,
    "fcos_proposals": check_fcos_proposals,
    "fpn": check_fpn,
    "gather": check_gather,
    "proposals": check_proposals,
    "sampling": check_sampling,
}
