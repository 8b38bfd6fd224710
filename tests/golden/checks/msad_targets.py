"""FCOS targets of the published MSAD code."""

from __future__ import annotations

import torch

from d2_distill.boxes.geometry import centers_of, distances_to_sides
from d2_distill.staged import DenseRun

from ..cases import Case
from ..dispatch import assert_close
from ..openmmlab import given_run, instances_of, level_sizes, point_bounds
from .msad_head import msad_fcos


def _run(case: Case) -> DenseRun:
    """FCOS on the recorded ground truth."""
    params = case.data["params"]
    size, strides = tuple(params["image_size"]), list(params["strides"])
    settings = {
        "NUM_CLASSES": params["num_classes"],
        "SIZES_OF_INTEREST": point_bounds([tuple(ends) for ends in params["sizes_of_interest"]]),
        "CENTER_SAMPLING_RADIUS": params["radius"] if params["center_sample"] else 0.0,
    }
    if not params["center_sample"]:
        case.skip("params", "radius")  # of no effect then
    model = msad_fcos(strides, settings)
    grids = [[-(-side // stride) for side in size] for stride in strides]
    num_images = params["num_images"]
    maps = {
        output: [torch.zeros(num_images, channels, *grid) for grid in grids]
        for output, channels in (("logits", params["num_classes"]), ("deltas", 4), ("centerness", 1))
    }
    gt_instances = [
        instances_of(size, case.tensor(f"gt_boxes_{image}").reshape(-1, 4), case.tensor(f"gt_classes_{image}").long())
        for image in range(num_images)
    ]
    return given_run(model, maps, [size] * num_images, gt_instances)


def _distances(run: DenseRun, boxes: torch.Tensor) -> torch.Tensor:
    """(N, R, 4) from the points to the sides of boxes (N, R, 4) or (N, 1, 4), in strides."""
    points = run.grid.centers
    return distances_to_sides(points, boxes) / run.grid.stride[:, None]


def _recorded(case: Case, run: DenseRun, key: str) -> torch.Tensor:
    """(N, R, ..) of all levels."""
    levels = [case.tensor(f"{key}_l{level}") for level in range(len(run.grid.strides))]
    return torch.cat([x.unflatten(0, (len(run.gt_instances), -1)) for x in levels], dim=1)


def check_targets(case: Case) -> None:
    run = _run(case)
    foreground = run.assignment.foreground
    counts = [int(level.sum()) for level in foreground.split(level_sizes(run), dim=1)]
    assert counts == case.data["positives_per_level"]
    assert_close(case, "labels", run.assignment.labels, _recorded(case, run, "labels").long())
    ours, recorded = _distances(run, run.assignment.boxes), _recorded(case, run, "reg")
    assert_close(case, "distances", ours[foreground], recorded[foreground])
    _assert_background(case, run, recorded, foreground)


def _assert_background(case: Case, run: DenseRun, recorded: torch.Tensor, foreground: torch.Tensor) -> None:
    """There the recording holds the distances to the first box; 0 where there is none."""
    for image, instances in enumerate(run.gt_instances):
        of_image, background = recorded[image], ~foreground[image]
        if len(instances):
            expected = _distances(run, instances.gt_boxes.tensor[:1])
            assert_close(case, f"background of image {image}", expected[background], of_image[background])
        else:
            assert not of_image.any()


def check_center_x_zero(case: Case) -> None:
    """The reference drops an image's boxes if the first one's centre has x = 0; here they take part."""
    run = _run(case)
    assert not any(case.data["positives_per_level"])
    labels = _recorded(case, run, "labels")
    assert (labels == run.staged.num_classes).all()
    _assert_background(case, run, _recorded(case, run, "reg"), torch.zeros_like(labels, dtype=torch.bool))
    boxes, classes = case.tensor("gt_boxes_0"), case.tensor("gt_classes_0").long()
    assert centers_of(boxes)[0, 0] == 0
    foreground = run.assignment.foreground[0]
    assert foreground.any() and set(run.assignment.labels[0, foreground].tolist()) == set(classes.tolist())


CHECKS = {"targets": check_targets, "targets_center_x_zero": check_center_x_zero}
