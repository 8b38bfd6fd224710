"""Which detections of an image are on an object of their class, and which objects are missed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torchvision.ops import box_iou

IOU = 0.5  # from which on a detection is on an object


class Match(NamedTuple):
    """(D,) whether each detection is right, and (G,) whether each object was missed."""

    right: torch.Tensor
    missed: torch.Tensor

    @property
    def errors(self) -> int:
        return int((~self.right).sum() + self.missed.sum())


def match_detections(found: Instances, truth: Instances) -> Match:
    """Give each object the surest detection of its class that overlaps it enough; what is left over is wrong."""
    overlap = box_iou(found.pred_boxes.tensor, truth.gt_boxes.tensor)
    overlap *= found.pred_classes[:, None] == truth.gt_classes
    right = torch.zeros(len(found), dtype=torch.bool)
    missed = torch.ones(len(truth), dtype=torch.bool)
    for index in found.scores.argsort(descending=True).tolist():
        free = overlap[index] * missed
        if len(truth) and free.max() >= IOU:
            right[index], missed[free.argmax()] = True, False
    return Match(right, missed)
