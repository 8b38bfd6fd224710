"""The student as region proposal network: positions, proposals, sampling, gathering, and its pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from d2_distill.apps.conversion.openmmlab import Tensors, pyramid
from d2_distill.assistants.proposals import DenseProposer, gather_positions, has_position, with_ground_truth
from d2_distill.backbones.pyramid import build_pyramid
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors import OpenMMLabFCOS, OpenMMLabRetinaNet, TowerDetector
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.box_coders import DistanceCoder
from d2_distill.staged import stage_detector

from .. import openmmlab
from ..cases import Case
from ..dispatch import assert_close, assert_recorded

LEVELS = [f"p{level}" for level in range(3, 8)]
# The recorded anchor of a cell at each place of ours.
RECORDED_ANCHORS = to_size_outer(torch.arange(9), openmmlab.NUM_SIZES, openmmlab.NUM_RATIOS)


def propose(
    model: TowerDetector,
    proposer: DenseProposer,
    image_sizes: Sequence[Sequence[int]],
    *,
    logits: list[torch.Tensor],
    deltas: list[torch.Tensor],
) -> list[Instances]:
    """Proposals of a detector whose prediction maps, in our order of anchors, are given."""
    images = ImageList(logits[0].new_zeros(len(image_sizes), 3, 1, 1), [tuple(size) for size in image_sizes])
    run = stage_detector(model).run(images)
    run.predictions = {"logits": logits, "deltas": deltas}
    return proposer.propose(run)


def check_anchors(case: Case) -> None:
    """The proposals are all anchors if all boxes stay; their logits put them in row order."""
    sizes = case.data["sizes"]
    counts = [9 * height * width for height, width in sizes]
    ranks = torch.arange(float(sum(counts))).neg().split(counts)
    logits = [x.view(1, *size, 9).permute(0, 3, 1, 2) for x, size in zip(ranks, sizes)]
    deltas = [x.new_zeros(1, 36, *size) for x, size in zip(ranks, sizes)]
    model = openmmlab.build_detector(OpenMMLabRetinaNet, deltas, case.data["strides"], num_classes=1)
    proposer = DenseProposer(max(counts), sum(counts), nms_thresh=1.0, min_box_size=-1)
    (proposals,) = propose(model, proposer, [(10**4, 10**4)], logits=logits, deltas=deltas)

    rows = zip(LEVELS, model.anchor_generator(deltas), proposals.positions.split(counts))
    for name, anchors, positions in rows:
        recorded = {
            key: openmmlab.in_our_order(model, case.tensor(f"{key}_{name}").unflatten(0, (-1, 9)), dim=1)
            for key in ("anchors", "pos")
        }
        assert_close(case, f"anchors_{name}", anchors.tensor, recorded["anchors"].flatten(0, 1))
        assert torch.equal(_recorded_anchors(positions).float(), recorded["pos"].flatten(0, 1))


def check_proposals(case: Case) -> None:
    logits, deltas = ([case.tensor(f"{key}_{name}") for name in LEVELS] for key in ("cls_logits", "deltas"))
    model = openmmlab.build_detector(
        OpenMMLabRetinaNet, logits, case.data["strides"], case.data["num_classes"]
    )
    logits, deltas = ([openmmlab.in_our_order(model, x, dim=1) for x in maps] for maps in (logits, deltas))
    _assert_proposals(case, model, logits, deltas, _recorded_anchors)


def check_fcos_proposals(case: Case) -> None:
    """Both forms of the distances, which are recorded in pixels."""
    logits, distances = (
        [case.tensor(f"{key}_{name}") for name in LEVELS] for key in ("cls_logits", "distances")
    )
    forms = {
        "exp": [x.log() for x in distances],
        "relu": [x / stride for x, stride in zip(distances, case.data["strides"])],
    }
    for form, deltas in forms.items():
        model = openmmlab.build_detector(
            OpenMMLabFCOS, logits, case.data["strides"], case.data["num_classes"],
            assigner=None, box_coder=DistanceCoder(form),
        )
        _assert_proposals(case, model, logits, deltas, lambda positions: positions)


def _assert_proposals(
    case: Case,
    model: TowerDetector,
    logits: list[torch.Tensor],
    deltas: list[torch.Tensor],
    recorded_positions: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    options = case.data["proposal_cfg"]
    proposer = DenseProposer(
        pre_nms_topk=options["nms_pre"],
        post_nms_topk=options["max_per_img"],
        nms_thresh=options["nms_iou"],
        min_box_size=options["min_bbox_size"],
    )
    found = propose(model, proposer, case.data["img_shapes"], logits=logits, deltas=deltas)
    for image, proposals in enumerate(found):
        columns = [
            proposals.proposal_boxes.tensor,
            proposals.objectness_logits.sigmoid()[:, None],
            recorded_positions(proposals.positions).float(),
        ]
        assert_recorded(case, f"proposals_{image}", torch.cat(columns, dim=1))


def _recorded_anchors(positions: torch.Tensor) -> torch.Tensor:
    return torch.cat([positions[:, :3], RECORDED_ANCHORS[positions[:, 3:]]], dim=1)


def check_sampling(case: Case) -> None:
    """The pool fits into the sample, so that only the order is drawn."""
    sampler, num_classes = case.data["sampler"], 80
    cfg = get_cfg()
    heads = cfg.MODEL.ROI_HEADS
    heads.IN_FEATURES, heads.NUM_CLASSES, heads.PROPOSAL_APPEND_GT = ["p3"], num_classes, False
    heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION = sampler["num"], sampler["pos_fraction"]
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    roi_heads = StandardROIHeads(cfg, {"p3": ShapeSpec(channels=1, stride=8)})

    boxes, classes = case.tensor("gt_boxes"), case.tensor("gt_labels")
    truth = openmmlab.instances_of((1000, 1000), boxes, classes)
    proposals = Instances(
        truth.image_size,
        proposal_boxes=Boxes(case.tensor("proposals")),
        objectness_logits=torch.zeros(len(case.tensor("proposals"))),
        positions=case.tensor("proposal_ids").long(),
    )
    (pool,) = with_ground_truth([proposals], [truth])
    pool.pool_index = torch.arange(len(pool))
    with EventStorage():
        (sampled,) = roi_heads.label_and_sample_proposals([pool], [truth])
    positive = sampled.gt_classes < num_classes
    num_positives = int(positive.sum())
    assert positive[:num_positives].all()
    parts = [sampled[rows] for rows in (positive, ~positive)]
    positives, negatives = [part[part.pool_index.argsort()] for part in parts]

    assert_recorded(case, "pos_inds", positives.pool_index)
    assert_recorded(case, "neg_inds", negatives.pool_index)
    ordered = Instances.cat([positives, negatives])
    assert_recorded(case, "sampled_boxes", ordered.proposal_boxes.tensor)
    assert_recorded(case, "sampled_ids", ordered.positions)
    assert_recorded(case, "pos_is_gt", ~has_position([positives.positions]))
    assigned = case.tensor("assigned_gt")[case.tensor("pos_inds")] - 1
    assert torch.equal(positives.gt_classes, classes[assigned])
    assert torch.equal(positives.gt_boxes.tensor, boxes[assigned])


def check_gather(case: Case) -> None:
    """In the second case, positions are those of maps of twice the size."""
    images, ids = case.tensor("roi_ids").long().split([1, 4], dim=1)
    cells = ids[:, 1:3].div(case.data["stride"], rounding_mode="floor")
    positions = torch.cat([ids[:, :1], cells, ids[:, 3:]], dim=1)
    maps = [case.tensor(f"feat_{name}") for name in LEVELS]
    per_image = [positions[images[:, 0] == image] for image in range(len(maps[0]))]
    # The recorded rows are not sorted by image.
    order = images[:, 0].argsort(stable=True)
    kept = has_position(per_image)
    back = order[kept].argsort()
    assert_recorded(case, "gathered", gather_positions(maps, per_image)[back])
    assert_recorded(case, "kept_row_features", case.tensor("row_features")[order][kept][back])
    assert_recorded(case, "anchor_ids", torch.cat(per_image)[kept, 3][back])


class _Stages(openmmlab.GivenMaps):
    """Recorded maps as the stages res2 to res5."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"res{stage}": maps for stage, maps in enumerate(self.maps, start=2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"res{stage}": ShapeSpec(channels=maps.shape[1], stride=stride)
            for stage, (maps, stride) in enumerate(zip(self.maps, self.strides), start=2)
        }


def check_fpn(case: Case) -> None:
    weights = {
        f"neck.{key[len('w.') :]}": case.tensor(key) for key in case.arrays if key.startswith("w.")
    }
    state, settings = pyramid(Tensors(weights, "the recording"), two_stage=False)
    cfg = get_distill_cfg()
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    stages = _Stages([case.tensor(f"c{level}") for level in range(2, 6)], [4, 8, 16, 32])
    fpn = build_pyramid(cfg, stages)
    fpn.load_state_dict({name[len("backbone.") :]: value for name, value in state.items()})
    maps = fpn(case.tensor("c2"))
    assert list(maps) == LEVELS
    for name in LEVELS:
        assert_recorded(case, name, maps[name])


CHECKS = {
    "anchors_pos": check_anchors,
    "fcos_proposals": check_fcos_proposals,
    "fpn": check_fpn,
    "gather": check_gather,
    "proposals": check_proposals,
    "sampling_all": check_sampling,
}
