"""Maps of pairs of runs: what is shown is what the methods compute."""

from __future__ import annotations

import pytest
import torch

from d2_distill.apps.pictures.level_maps import SELECTED, feature_maps, focal_maps, region_maps
from d2_distill.assigners import atss_thresholds
from d2_distill.methods.imitation_regions import inside_gt
from d2_distill.regions import focal_masks, spatial_attention, valuable_region
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ...small_detectors import build, detector_cfg, image_input


def runs_of(case, teacher_case=None, **options):
    """Config, runs of the student and of the teacher on an image with two boxes, and the teacher."""
    cfg = detector_cfg(case, **options)
    sample = image_input(64, 96, [[4, 4, 40, 44], [50, 10, 90, 60]], [0, 2])
    student = stage_detector(build(cfg, salt=1).eval())
    images, truth = student.preprocess([sample]), [sample["instances"]]
    run = student.run(images, truth, frozen=True)
    if teacher_case is None:
        return cfg, run, None, None
    teacher = Teacher(build(detector_cfg(teacher_case), salt=2), input_format="BGR")
    teacher_run = teacher.run([sample], images, student_format="BGR", normalises_alike=True, gt_instances=truth)
    return cfg, run, teacher_run, teacher


def test_features_of_both_sides_and_what_fgd_weighs():
    _, student, teacher, _ = runs_of("GFL", "GFL")
    columns = feature_maps(student, teacher)
    assert [column.title for column in columns] == [
        "student: energy", "teacher: energy", "student: attention", "teacher: attention"
    ]
    mask, weights = focal_maps(student, columns[3])
    for level, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
        assert torch.equal(columns[0].maps[level], student.features[level].abs().mean(dim=1)[0])
        attention = spatial_attention(teacher.features[level])[0]
        assert torch.equal(columns[3].maps[level], attention)
        size = tuple(attention.shape)
        both = sum(focal_masks(student.truth.boxes, student.truth.valid, size, stride))[0]
        assert torch.equal(mask.maps[level], both)
        assert torch.equal(weights.maps[level], both * attention)


def test_levels_that_the_teacher_lacks_are_left_out():
    _, student, teacher, _ = runs_of("GeneralizedRCNN", "RetinaNet")
    columns = feature_maps(student, teacher)
    assert list(columns[0].maps) == ["p2", "p3", "p4", "p5"]
    assert list(columns[1].maps) == ["p3", "p4", "p5"]


def test_regions_are_those_of_the_methods():
    cfg, student, teacher_run, teacher = runs_of("GFL", "GFL")
    columns, missing = region_maps(cfg, list(SELECTED), student, teacher_run, teacher)
    assert not missing and [column.title for column in columns] == list(SELECTED)
    shown = {column.title: torch.cat([x.flatten() for x in column.maps.values()]) for column in columns}
    assert torch.equal(shown["main"] > 0, student.assignment.foreground[0]) and shown["main"].any()
    assert torch.equal(shown["inside_gt"] > 0, inside_gt(student, teacher_run)[0])
    grid, truth = student.grid, student.truth
    thresholds = atss_thresholds(grid.boxes, grid.level_sizes, truth.boxes, grid.valid)
    expected = valuable_region(grid.boxes, truth.boxes, truth.valid, thresholds, grid.valid)[0]
    assert torch.equal(shown["vlr"], expected) and expected.any()
    [general] = [column for column in columns if column.title == "gibox"]
    assert 1 <= (general.maps["p3"] > 0).sum() <= 10
    for column in columns:
        for level, values in column.maps.items():
            assert column.remarks[level].startswith(f"{int((values > 0).sum())} cells")


def test_a_cell_of_several_anchors_is_selected_by_any():
    cfg, student, *_ = runs_of("RetinaNet")
    [column], _ = region_maps(cfg, ["main"], student, None, None)
    anchors = student.assignment.foreground[0].view(-1, 6)
    selected = torch.cat([x.flatten() for x in column.maps.values()]) > 0
    assert torch.equal(selected, anchors.any(dim=1))


@pytest.mark.parametrize(
    "case, teacher_case, missing",
    [
        ("RetinaNet", None, {"gibox": "there is no teacher"}),
        ("OpenMMLabFCOS", "OpenMMLabFCOS", {"finegrained": "assigns points"}),
        ("GFL", "GeneralizedRCNN", {"gibox": "needs a one-stage student and teacher"}),
        (
            "GeneralizedRCNN", "GeneralizedRCNN",
            {"main": "one-stage", "vlr": "one of anchors", "finegrained": "one-stage", "gibox": "one-stage"},
        ),
    ],
)
def test_what_a_pair_does_not_have_is_told(case, teacher_case, missing):
    cfg, student, teacher_run, teacher = runs_of(case, teacher_case)
    columns, sentences = region_maps(cfg, list(SELECTED), student, teacher_run, teacher)
    assert [column.title for column in columns] == [name for name in SELECTED if name not in missing]
    assert len(sentences) == len(missing)
    for name, part in missing.items():
        assert any(sentence.startswith(f"{name} is not shown") and part in sentence for sentence in sentences)
