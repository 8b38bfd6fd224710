"""Recorded pooling of RoIs: the teacher's, and the assistant's from the student's coarser maps."""

from __future__ import annotations

import re

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes

from d2_distill.assistants.roi import RoIAssistant

from ..cases import Case
from ..dispatch import assert_recorded
from ..openmmlab import set_keys


def check_roi_extract(case: Case) -> None:
    images, corners = case.tensor("rois").split([1, 4], dim=1)
    for role in ("student", "teacher"):
        prefix = f"{role}_feat_stride"
        strides = sorted(int(key[len(prefix) :]) for key in case.arrays if key.startswith(prefix))
        maps = [case.tensor(f"{prefix}{stride}") for stride in strides]
        shapes = {f"of{s}": ShapeSpec(channels=x.shape[1], stride=s) for s, x in zip(strides, maps)}
        rows = [(images[:, 0] == image).nonzero()[:, 0] for image in range(len(maps[0]))]
        boxes, order = [Boxes(corners[of_image]) for of_image in rows], torch.cat(rows)

        cfg = get_cfg()
        set_keys(cfg, {
            "ROI_HEADS.NAME": "StandardROIHeads",
            "ROI_HEADS.IN_FEATURES": list(shapes),
            "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "ROI_BOX_HEAD.NUM_FC": 1,
            "ROI_BOX_HEAD.POOLER_RESOLUTION": case.tensor(f"{role}_roi_feats").shape[-1],
        })
        if role == "student":
            pooler = RoIAssistant.build(cfg, shapes, num_classes=1).roi_heads.box_pooler
        else:
            pooler = StandardROIHeads(cfg, shapes).box_pooler
        sampling = re.search(r"sampling ratio (\d+) = adaptive, aligned=(\w+)", case.data["what"])
        assert {(x.sampling_ratio, str(x.aligned)) for x in pooler.level_poolers} == {(int(sampling[1]), sampling[2])}
        assigned = assign_boxes_to_levels(
            boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
        )
        assert torch.equal(assigned, case.tensor(f"{role}_levels")[order])
        pooled = pooler(maps, boxes)
        in_recorded_order = torch.empty_like(pooled)
        in_recorded_order[order] = pooled
        assert_recorded(case, f"{role}_roi_feats", in_recorded_order)


CHECKS = {"roi_extract": check_roi_extract}
