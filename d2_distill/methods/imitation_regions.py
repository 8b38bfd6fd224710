"""Which cells of the feature maps are imitated: the regions of :mod:`d2_distill.regions` for a pair of runs.

A cell is a location of a feature map; with several anchors it is in a region if any of them is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

from ..losses.channel_statistics import OWN
from ..losses.reduction import Batch
from ..regions import finegrained_region, general_instance_rows, inside_boxes
from ..staged import DenseRun, Run

# The student's and the teacher's run -> (N, R) bool, anchors of the student that are in the region; R is the
# number of cells if it is no dense detector.
AnchorRegion = Callable[[Run, Run], torch.Tensor]


@dataclass(frozen=True)
class ImitationRegion:
    """
    Attributes:
        anchors: finds the anchors of the region.
        background_weight: of the mean over the cells outside of it; 0 leaves them out.
    """

    anchors: AnchorRegion
    background_weight: float = 0.0

    def weights(self, student: Run, teacher: Run, batch: Batch = OWN) -> dict[str, torch.Tensor]:
        """Return the student's feature name -> (N, H * W) weights, with which a sum over cells is a mean.

        They are 0 on levels without any cell in the region, and without any positive anchor. ``batch`` says whose
        cells are counted.
        """
        levels = self.cells(student, teacher)
        # Of each level: cells in the region, outside of it, with positives.
        counts = [
            torch.stack([inside.sum(), (valid & ~inside).sum(), positive.sum()])
            for inside, valid, positive in levels.values()
        ]
        counted = zip(levels.items(), batch.mean(torch.stack(counts)))
        return {name: self._weights(*cells[:2], means, batch) for (name, cells), means in counted}

    def cells(self, student: Run, teacher: Run) -> dict[str, torch.Tensor]:
        """The student's feature name -> (3, N, H * W) bool: cells in the region, no padding, with positives."""
        inside = self.anchors(student, teacher)
        valid, positive = _valid_and_positive(student, inside)
        return cells_of(student, torch.stack([inside & valid, valid, positive]))

    def _weights(
        self, inside: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        num_inside, num_outside, num_positives = counts
        weights = inside / batch.at_least_one(num_inside)
        if self.background_weight:
            outside = valid & ~inside
            weights = weights + self.background_weight * outside / batch.at_least_one(num_outside)
        return weights * ((num_inside > 0) & (num_positives > 0))


def cells_of(student: Run, anchors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values (..., R) of anchors -> the student's feature name -> (..., H * W), of a cell's anchors the largest."""
    sizes = [feature.shape[-2:].numel() for feature in student.features.values()]
    cells = anchors.unflatten(-1, (sum(sizes), -1)).amax(dim=-1)
    return dict(zip(student.features, cells.split(sizes, dim=-1)))


def _valid_and_positive(student: Run, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, R) bool each; all anchors are where the student does not tell."""
    everything = torch.ones_like(like)
    if student.staged.family != "dense":
        return everything, everything
    valid = student.grid.valid
    return everything if valid is None else valid, student.assignment.foreground


def inside_gt(student: Run, teacher: Run) -> torch.Tensor:
    """Centres strictly inside a ground-truth box: of anchors or, where there are none, of cells."""
    if student.staged.family == "dense":
        points = student.grid.centers
    else:
        strides = [shape.stride for shape in student.staged.feature_shapes().values()]
        points = torch.cat([_cell_centers(*level) for level in zip(student.features.values(), strides)])
    return inside_boxes(points, student.truth.boxes, student.truth.valid)


def _cell_centers(feature: torch.Tensor, stride: int) -> torch.Tensor:
    """(H * W, 2) XY in pixels."""
    ys, xs = ((torch.arange(size, device=feature.device) + 0.5) * stride for size in feature.shape[-2:])
    return torch.cartesian_prod(ys, xs).flip(dims=[-1])


def finegrained(student: DenseRun, teacher: Run) -> torch.Tensor:
    """Anchors near objects, see :func:`~d2_distill.regions.finegrained_region`."""
    grid, truth = student.grid, student.truth
    return finegrained_region(grid.boxes, truth.boxes, truth.valid, grid.valid)


def positives(student: DenseRun, teacher: Run) -> torch.Tensor:
    """Anchors to which the student's assigner gave an object."""
    return student.assignment.foreground


def general_instances(student: DenseRun, teacher: DenseRun, *, per_image: bool = True) -> torch.Tensor:
    """Up to 10 anchors a level where student and teacher disagree most about the classes.

    See :func:`~d2_distill.regions.general_instance_rows`.

    Args:
        per_image: 10 of each image. False: 10 of the batch, and boxes suppress those of other images.
    """
    grid = student.grid
    predictions = [x for pair in zip(scores_and_boxes(student), scores_and_boxes(teacher)) for x in pair]
    if grid.valid is not None:
        # Without a difference in scores padding comes last.
        predictions[1] = predictions[1].where(grid.valid[..., None], predictions[0])
    masks = []
    for level in zip(*map(grid.split, predictions)):
        groups = level if per_image else [x.flatten(end_dim=1)[None] for x in level]
        mask = torch.zeros(groups[0].shape[:2], dtype=torch.bool, device=groups[0].device)
        for chosen, group in zip(mask, zip(*groups)):
            chosen[general_instance_rows(*group)] = True
        masks.append(mask.view(level[0].shape[:2]))
    return torch.cat(masks, dim=1)


@torch.no_grad()
def scores_and_boxes(run: DenseRun) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities (N, R, num_classes) and XYXY boxes (N, R, 4) in pixels, without gradient."""
    # GFLv2 has one score more than classes.
    scores = run.staged.class_scores(run.outputs)[..., : run.staged.num_classes]
    return scores, run.staged.decode(run.grid, run.outputs["deltas"])


# By the name in MODEL.DISTILL.IMITATION.REGION.
REGIONS: dict[str, AnchorRegion] = {
    "inside_gt": inside_gt,
    "decouple": inside_gt,
    "finegrained": finegrained,
    "gibox": general_instances,
    "main": positives,
}
