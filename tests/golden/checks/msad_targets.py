"""FCOS targets of the published MSAD code."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

from d2_distill.assigners import Assignment, GroundTruth, match_points
from d2_distill.boxes.geometry import centers_of

from ..cases import Case


def _grid(image_size: list[int], strides: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Centres of the cells of all levels, and how many each level has."""
    levels = []
    for stride in strides:
        y, x = (torch.arange(stride // 2, size, stride, dtype=torch.float32) for size in image_size)
        levels.append(torch.cartesian_prod(y, x).flip(dims=[1]))
    return torch.cat(levels), [len(level) for level in levels]


def _assignment(case: Case) -> tuple[Assignment, torch.Tensor, list[int]]:
    """Of all levels; the distances (N, R, 4) in strides, and the levels' sizes."""
    params = case.data["params"]
    points, level_sizes = _grid(params["image_size"], params["strides"])
    repeats = torch.tensor(level_sizes)
    strides = torch.tensor(params["strides"], dtype=torch.float32).repeat_interleave(repeats)
    ranges = torch.tensor(params["sizes_of_interest"], dtype=torch.float32).repeat_interleave(repeats, dim=0)
    ranges[-level_sizes[-1] :, 1] = float("inf")
    gt_instances = []
    for image in range(params["num_images"]):
        instances = Instances(tuple(params["image_size"]))
        instances.gt_boxes = Boxes(case.tensor(f"gt_boxes_{image}").reshape(-1, 4))
        instances.gt_classes = case.tensor(f"gt_classes_{image}").long()
        gt_instances.append(instances)
    gt = GroundTruth.from_instances(gt_instances)
    radius = params["radius"] if params["center_sample"] else 0.0
    matches = match_points(points, strides, ranges, gt.boxes, gt.valid, center_sampling_radius=radius)
    assignment = gt.assignment(matches, params["num_classes"])
    distances = torch.cat([points - assignment.boxes[..., :2], assignment.boxes[..., 2:] - points], dim=-1)
    return assignment, distances / strides[:, None], level_sizes


def check_targets(case: Case) -> None:
    """Distances are compared at positives: elsewhere the recording holds those to an arbitrary box."""
    assignment, distances, level_sizes = _assignment(case)
    labels = assignment.labels.split(level_sizes, dim=1)
    foreground = assignment.foreground.split(level_sizes, dim=1)
    counts = [int(level.sum()) for level in foreground]
    assert counts == case.data["positives_per_level"]
    for level, level_distances in enumerate(distances.split(level_sizes, dim=1)):
        assert torch.equal(labels[level].flatten(), case.tensor(f"labels_l{level}").long())
        positive = foreground[level].flatten()
        torch.testing.assert_close(
            level_distances.flatten(0, 1)[positive],
            case.tensor(f"reg_l{level}")[positive],
            **case.data["tolerance"],
        )


def check_center_x_zero(case: Case) -> None:
    """The reference drops an image's boxes if the first one's centre has x = 0; here they take part."""
    assert not any(case.data["positives_per_level"])
    assignment, _, _ = _assignment(case)
    boxes, classes = case.tensor("gt_boxes_0"), case.tensor("gt_classes_0").long()
    assert centers_of(boxes)[0, 0] == 0
    foreground = assignment.foreground[0]
    assert foreground.any() and set(assignment.labels[0, foreground].tolist()) == set(classes.tolist())


CHECKS = {"targets": check_targets, "targets_center_x_zero": check_center_x_zero}
