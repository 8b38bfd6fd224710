"""A one-stage detector as region proposal network, whose proposals remember where in its maps they came from.

A position is (level, y, x, anchor): the cell of a level's feature map, 0 the finest level, and the anchor
within the cell in Detectron2's order. Ground-truth boxes among proposals have level -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from ..staged import DenseRun

# Detectron2's objectness of ground truth: the logit of a probability of almost 1.
GROUND_TRUTH_LOGIT = math.log((1.0 - 1e-10) / (1.0 - (1.0 - 1e-10)))


@dataclass(frozen=True)
class DenseProposer:
    """Turns the predictions of a one-stage detector into proposals (HEAD, arXiv 2207.05345).

    The best class alone ranks an anchor, without centerness. Suppression is within a level, whatever the class.

    Args:
        pre_nms_topk: anchors of a level that are kept before the non-maximum suppression.
        post_nms_topk: proposals of an image.
        nms_thresh: IoU above which the better of two boxes of a level suppresses the other.
        min_box_size: both sides of a clipped box must be longer, in pixels.
    """

    pre_nms_topk: int
    post_nms_topk: int
    nms_thresh: float
    min_box_size: float

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "DenseProposer":
        """By the keys of the region proposal network of the detector that the config describes."""
        return cls(
            pre_nms_topk=cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN,
            post_nms_topk=cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN,
            nms_thresh=cfg.MODEL.RPN.NMS_THRESH,
            min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        )

    @torch.no_grad()
    def propose(self, run: DenseRun) -> list[Instances]:
        """Proposals without gradient; non-finite predictions give none.

        Returns:
            per image, by descending logit: ``proposal_boxes``, clipped to the image without its padding;
            ``objectness_logits`` (R,), the largest class logit; ``positions`` (R, 4) int64.
        """
        grid = run.grid
        levels = zip(*map(grid.split, (run.outputs["logits"], run.outputs["deltas"])), grid.split(grid.boxes, dim=0))
        candidates = []
        for level, (logits, deltas, anchors) in enumerate(levels):
            # GFLv2 has one score more than classes.
            logits = logits[..., : run.staged.num_classes].amax(dim=-1).float()
            logits, rows = logits.topk(min(self.pre_nms_topk, logits.shape[1]))
            deltas = deltas.take_along_dim(rows[..., None], dim=1)
            strides = anchors.new_full(rows.shape, grid.strides[level])
            boxes = run.staged.decode_rows(deltas, anchors[rows], strides)
            positions = _positions(rows, level, grid.map_sizes[level], grid.anchors_per_cell)
            candidates.append((boxes, logits, positions))
        batch = [torch.cat(parts, dim=1) for parts in zip(*candidates)]
        return [self._suppress(*image) for image in zip(run.images.image_sizes, *batch)]

    def _suppress(
        self, image_size: tuple[int, int], boxes: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor
    ) -> Instances:
        """The proposals of an image among its candidates of all levels."""
        candidates = Instances(
            image_size, proposal_boxes=Boxes(boxes), objectness_logits=logits, positions=positions
        )
        candidates = candidates[boxes.isfinite().all(dim=1) & logits.isfinite()]
        candidates.proposal_boxes.clip(image_size)
        candidates = candidates[candidates.proposal_boxes.nonempty(self.min_box_size)]
        candidates = candidates[candidates.objectness_logits.argsort(descending=True, stable=True)]
        # The best candidates decide among themselves: most often a few of them give all proposals wanted.
        count = 2 * self.post_nms_topk
        while True:
            best = candidates[:count]
            keep = batched_nms(
                best.proposal_boxes.tensor, best.objectness_logits, best.positions[:, 0], self.nms_thresh
            )
            if len(keep) >= self.post_nms_topk or len(best) == len(candidates):
                return best[keep[: self.post_nms_topk]]
            count *= 2


def _positions(rows: torch.Tensor, level: int, map_size: tuple[int, int], per_cell: int) -> torch.Tensor:
    """(..., 4) positions of rows (...) among the anchors of a level of (H, W) cells with ``per_cell`` anchors each."""
    _, width = map_size
    cells = rows // per_cell
    return torch.stack([torch.full_like(rows, level), cells // width, cells % width, rows % per_cell], dim=-1)


def with_ground_truth(proposals: Sequence[Instances], gt_instances: Sequence[Instances]) -> list[Instances]:
    """Put each image's ground-truth boxes in front of its proposals, at positions (-1, -1, -1, index).

    Args:
        proposals: of :meth:`DenseProposer.propose`.
        gt_instances: with ``gt_boxes``.

    Returns:
        per image, Instances with the fields of the proposals.
    """
    results = []
    for of_image, truth in zip(proposals, gt_instances):
        positions = of_image.positions.new_full((len(truth), 4), -1)
        positions[:, 3] = torch.arange(len(truth))
        boxes = Instances(
            of_image.image_size,
            proposal_boxes=truth.gt_boxes,
            objectness_logits=of_image.objectness_logits.new_full((len(truth),), GROUND_TRUTH_LOGIT),
            positions=positions,
        )
        results.append(Instances.cat([boxes, of_image]))
    return results


def has_position(positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which rows come from the maps, not from ground truth: per image (R_i, 4) to (sum R_i,) bool."""
    return torch.cat(list(positions))[:, 0] >= 0


def gather_positions(maps: Sequence[torch.Tensor], positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Feature vectors at the positions that lie in the maps, in their order; a position may repeat.

    Args:
        maps: per level (N, C, H, W).
        positions: per image (R_i, 4); rows without a position (:func:`has_position`) are left out.

    Returns:
        (M, C), with gradient to the maps.
    """
    images = torch.cat([torch.full_like(rows[:, 0], image) for image, rows in enumerate(positions)])
    levels, ys, xs, _ = torch.cat(list(positions)).unbind(dim=1)
    order, vectors = [], []
    for level, features in enumerate(maps):
        rows = (levels == level).nonzero().squeeze(1)
        order.append(rows)
        vectors.append(features[images[rows], :, ys[rows], xs[rows]])
    return torch.cat(vectors)[torch.cat(order).argsort()]
