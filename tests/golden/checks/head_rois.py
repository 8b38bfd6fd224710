"""Recorded pooling of RoIs: the teacher's, and the assistant's from the student's coarser maps."""

from __future__ import annotations

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes

from d2_distill.assistants.roi import RoIAssistant

from ..cases import Case
from ..dispatch import assert_recorded


def check_roi_extract(case: Case) -> None:
    images, corners = case.tensor("rois").split([1, 4], dim=1)
    rows = [(images[:, 0] == image).nonzero()[:, 0] for image in (0, 1)]
    boxes, order = [Boxes(corners[of_image]) for of_image in rows], torch.cat(rows)
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]

    for role, finest in (("student", 3), ("teacher", 2)):
        levels = range(finest, finest + 4)
        shapes = {f"p{level}": ShapeSpec(channels=3, stride=2**level) for level in levels}
        if role == "student":
            heads, canonical_level = RoIAssistant.build(cfg, shapes, num_classes=3).roi_heads, 5
        else:
            heads, canonical_level = StandardROIHeads(cfg, shapes), 4
        assigned = assign_boxes_to_levels(boxes, finest, finest + 3, 224, canonical_level)
        assert torch.equal(assigned, case.tensor(f"{role}_levels")[order])
        pooled = heads.box_pooler([case.tensor(f"{role}_feat_stride{2**level}") for level in levels], boxes)
        in_recorded_order = torch.empty_like(pooled)
        in_recorded_order[order] = pooled
        assert_recorded(case, f"{role}_roi_feats", in_recorded_order)


CHECKS = {"roi_extract": check_roi_extract}
