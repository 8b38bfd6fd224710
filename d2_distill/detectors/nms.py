"""Exchange the NMS of a dense detector, Detectron2's own detectors included, by ``TEST.NMS``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from detectron2.structures import Boxes, Instances
from torch import nn

from ..errors import UserError
from ..postprocess import cluster_nms
from ..staged import adapter_of

OWN_NMS = "nms"
CLUSTER_NMS = {
    "cluster_nms": {"overlap": "iou", "voting": "none"},
    "cluster_diou_nms": {"overlap": "diou", "voting": "none"},
    "weighted_cluster_nms": {"overlap": "iou", "voting": "weighted"},
    "weighted_cluster_diou_nms": {"overlap": "diou", "voting": "weighted"},
    "voting_cluster_nms": {"overlap": "iou", "voting": "score"},
    "voting_cluster_diou_nms": {"overlap": "diou", "voting": "score"},
}


@dataclass(frozen=True)
class ClusterNMS:
    """Forward hook of a detector: in eval mode, :func:`cluster_nms` on the instances of each image.

    Args:
        iou_threshold, overlap, voting: of :func:`cluster_nms`.
        max_detections: how many of the best are kept in an image.
    """

    iou_threshold: float
    max_detections: int
    overlap: str
    voting: str

    def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        if model.training:
            return outputs
        return [{**output, "instances": self.suppress(output["instances"])} for output in outputs]

    def suppress(self, instances: Instances) -> Instances:
        """The kept detections, best first, with voted boxes; other fields stay theirs."""
        keep, boxes = cluster_nms(
            instances.pred_boxes.tensor,
            instances.scores,
            instances.pred_classes,
            self.iou_threshold,
            overlap=self.overlap,
            voting=self.voting,
        )
        kept = instances[keep[: self.max_detections]]
        kept.pred_boxes = Boxes(boxes[: self.max_detections])
        return kept


def select_nms(model: nn.Module, name: str) -> None:
    """Let a dense detector suppress duplicates by the NMS called ``name`` when it is evaluated.

    "nms" leaves the model as it is. Otherwise the model's own NMS is switched off, and its
    ``test_nms_thresh`` and ``max_detections_per_image`` go to a :class:`ClusterNMS`, which works on what the
    model returns: boxes clipped and in coordinates of the original image, as published. Training and state
    dict are untouched.

    Raises:
        UserError: there is no such NMS, or the model is no dense detector.
    """
    if name == OWN_NMS:
        return
    if name not in CLUSTER_NMS:
        raise UserError(f"TEST.NMS is {name!r}; choose one of {', '.join([OWN_NMS, *CLUSTER_NMS])}.")
    adapter = adapter_of(type(model))
    if adapter is None or adapter.family != "dense":
        raise UserError(
            f"TEST.NMS is {name!r}, which works with one-stage detectors such as RetinaNet and FCOS, not "
            f"with {type(model).__name__}; set it to {OWN_NMS!r}."
        )
    detector = adapter(model).innermost
    model.register_forward_hook(
        ClusterNMS(detector.test_nms_thresh, detector.max_detections_per_image, **CLUSTER_NMS[name])
    )
    detector.test_nms_thresh = math.inf
    detector.max_detections_per_image = sys.maxsize
