"""The ground truth of a batch in tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch.nn.utils.rnn import pad_sequence

from .assignment import IGNORED, Assignment, Match


@dataclass(frozen=True)
class GroundTruth:
    """Boxes and classes of N images, padded to the G boxes of the fullest one; G is 0 if all are empty.

    Attributes:
        boxes: (N, G, 4) XYXY in pixels; zeros where padded.
        classes: (N, G) int64; 0 where padded.
        valid: (N, G) bool, False where padded.
        instances: what it was made from, for detectors that take Detectron2's form.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    valid: torch.Tensor
    instances: list[Instances] | None = None

    @classmethod
    def from_instances(cls, gt_instances: list[Instances]) -> "GroundTruth":
        """Pad Detectron2's ``gt_boxes`` and ``gt_classes``, one entry an image."""
        classes = [instances.gt_classes for instances in gt_instances]
        return cls(
            boxes=pad_sequence([instances.gt_boxes.tensor for instances in gt_instances], batch_first=True),
            classes=pad_sequence(classes, batch_first=True),
            valid=pad_sequence([torch.ones_like(c, dtype=torch.bool) for c in classes], batch_first=True),
            instances=gt_instances,
        )

    def assignment(
        self, match: Match, num_classes: int, valid_anchors: torch.Tensor | None = None
    ) -> Assignment:
        """Return what each anchor has to predict; the boxes of background and ignored anchors are zeros.

        Args:
            match: of R anchors.
            num_classes: number of foreground classes.
            valid_anchors: (N, R) bool; the others get no classification loss. None: all are valid.
        """
        # One more entry after the boxes stands for no box: it is what -1 indexes.
        rows = torch.arange(len(match.boxes), device=match.boxes.device)[:, None], match.boxes.clamp(min=-1)
        labels = F.pad(self.classes, (0, 1), value=num_classes)[rows]
        boxes = F.pad(self.boxes, (0, 0, 0, 1))[rows]
        ignored = match.boxes == IGNORED
        if valid_anchors is not None:
            ignored = ignored | ~valid_anchors
        return Assignment(
            labels.masked_fill(ignored, -1), boxes, num_classes, scores=match.scores, thresholds=match.thresholds
        )
