"""RetinaNet and FCOS with the anchors and the inference of torchvision, for its checkpoints."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances

from .fcos import FCOS


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors in whole pixels, on a grid that is stretched over the batch.

    Corners of a cell's anchors are rounded (halves to even). Cells of a level lie the side of the batch divided by
    their number apart, rounded down: where P6 has 13 rows for 800 pixels, 61 pixels and not 64.

    Args:
        kwargs: of DefaultAnchorGenerator; strides must start with that of the finest map, which has to divide the
            sides of the batch.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for cell in self.cell_anchors:
            cell.round_()

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """Each level's H * W * A anchors, ordered by row, column, cell anchor."""
        sides = [cells * self.strides[0] for cells in features[0].shape[-2:]]
        anchors = []
        for feature, cell in zip(features, self.cell_anchors):
            rows, columns = (
                (torch.arange(cells, device=cell.device) + self.offset) * (side // cells)
                for side, cells in zip(sides, feature.shape[-2:])
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centers = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((centers + cell).reshape(-1, 4)))
        return anchors


class ClippedCandidates:
    """Mixin of Detectron2's dense detectors: boxes are clipped to the image before the suppression, not behind it."""

    def inference_single_image(
        self,
        anchors: list[Boxes],
        scores: list[torch.Tensor],
        deltas: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Detections, best first, from scores (R_l, K) and deltas (R_l, 4) of each level's anchors."""
        levels = zip(anchors, scores, deltas)
        candidates = Instances.cat([self._clipped_candidates(*level, image_size) for level in levels])
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        keep = batched_nms(boxes, candidates.scores, classes, self.test_nms_thresh)
        return candidates[keep[: self.max_detections_per_image]]

    def _clipped_candidates(
        self, anchors: Boxes, scores: torch.Tensor, deltas: torch.Tensor, image_size: tuple[int, int]
    ) -> Instances:
        rows, classes = (scores > self.test_score_thresh).nonzero(as_tuple=True)
        best_scores, best = scores[rows, classes].topk(min(len(rows), self.test_topk_candidates))
        rows = rows[best]
        boxes = Boxes(self.box2box_transform.apply_deltas(deltas[rows], anchors.tensor[rows]))
        boxes.clip(image_size)
        return Instances(image_size, pred_boxes=boxes, scores=best_scores, pred_classes=classes[best])


@META_ARCH_REGISTRY.register()
class TorchvisionRetinaNet(ClippedCandidates, RetinaNet):
    """Detectron2's RetinaNet that detects as torchvision's; its anchors are ``TorchvisionAnchorGenerator``'s if
    ``MODEL.ANCHOR_GENERATOR.NAME`` says so. Training is Detectron2's."""


@META_ARCH_REGISTRY.register()
class TorchvisionFCOS(ClippedCandidates, FCOS):
    """Detectron2's FCOS with the locations of torchvision's, the upper left corners of the cells, and its inference.

    Training is Detectron2's, of which torchvision's is a port.

    Args:
        kwargs: of FCOS.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        strides = self.anchor_generator.strides
        self.anchor_generator = TorchvisionAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
        )
