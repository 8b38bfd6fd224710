"""Feature imitation against loops over cells, also where there is nothing to imitate; refused pairs."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage

from d2_distill.distiller import Distiller
from d2_distill.errors import UserError
from d2_distill.methods import FeatureImitation, build_methods
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..assigners.scenes import slow_iou
from ..small_detectors import batch, build, detector_cfg, distiller_cfg, image_input, save_teacher

DENSE_REGIONS = ["inside_gt", "decouple", "finegrained", "gibox", "main"]
# Several anchors a cell, other centres, padding that the assigner leaves out, more scores than classes.
DENSE = ["RetinaNet", "OpenMMLabRetinaNet", "FCOS", "ATSS", "GFL", "GFLv2", "TOOD"]
# FCOS assigns points.
ALLOWED = [
    (region, case) for region in DENSE_REGIONS for case in DENSE if (region, case) != ("finegrained", "FCOS")
]
NARROW = {"FPN__OUT_CHANNELS": 16, "GFL__NORM": ""}


@functools.lru_cache(maxsize=None)
def staged(case: str, salt=None):
    return stage_detector(build(detector_cfg(case), salt))


def imitation(region: str, student: str, teacher: str = "", theirs=None, **overrides) -> FeatureImitation:
    """The method for (case of student, case of teacher); overrides are below MODEL.DISTILL.IMITATION."""
    overrides = {f"DISTILL__IMITATION__{key}": value for key, value in overrides.items()}
    overrides["DISTILL__IMITATION__REGION"] = region
    cfg = distiller_cfg(student, None, ["FeatureImitation"], **overrides)
    other = detector_cfg(teacher or student, **(theirs or {}))
    return build_methods(cfg, staged(student), Teacher(build(other), input_format="BGR", cfg=other))["FeatureImitation"]


def runs(student: str, teacher: str = "", inputs=None, salt=None):
    """A run of each; their parameters differ."""
    inputs = inputs or batch()
    images = staged(student, salt).preprocess(inputs)
    gt_instances = [x["instances"] for x in inputs]
    theirs = staged(teacher or student, 1).run(images, gt_instances, frozen=True)
    return staged(student, salt).run(images, gt_instances), theirs


# The slow form: sets of (image, anchor), level by level.


def slow_inside(run, image, points):
    boxes = run.gt_instances[image].gt_boxes.tensor.tolist()
    return {k for k, (x, y) in enumerate(points) if any(l < x < r and t < y < b for l, t, r, b in boxes)}


def slow_finegrained(run, image, valid):
    anchors = run.grid.boxes.tolist()
    near = set()
    for box in run.gt_instances[image].gt_boxes.tensor.tolist():
        overlaps = {k: slow_iou(anchors[k], box) for k in valid}
        near |= {k for k, overlap in overlaps.items() if overlap > 0.5 * max(overlaps.values())}
    return near


def slow_instances(student, teacher, rows, level):
    """Of the (image, anchor of the level) in ``rows``, the up to 10 that general instances are at."""
    scores, boxes = [], []
    for run in (student, teacher):
        outputs = {name: run.grid.split(output)[level] for name, output in run.outputs.items()}
        scores.append(run.staged.class_scores(outputs)[..., :3].tolist())
        decoded = run.staged.decode(run.grid, run.outputs["deltas"])
        boxes.append(run.grid.split(decoded)[level].tolist())
    ranked = []
    for image, k in rows:
        pairs = zip(scores[0][image][k], scores[1][image][k])
        difference, teacher_higher = max((abs(theirs - ours), theirs >= ours) for ours, theirs in pairs)
        ranked.append((difference, image, k, boxes[teacher_higher][image][k]))
    kept = []
    for _, image, k, box in sorted(ranked, reverse=True):
        if len(kept) < 10 and all(slow_iou(box, other) <= 0.3 for *_, other in kept):
            kept.append((image, k, box))
    return {(image, k) for image, k, _ in kept}


def slow_region(name, student, teacher, per_image):
    """Per level: the (image, cell) inside, and those outside that are no padding."""
    sizes, starts = student.grid.level_sizes, [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    points = student.grid.centers.tolist()
    images = range(len(student.gt_instances))
    everything = set(range(starts[-1]))
    valid = {image: everything for image in images}
    if student.grid.valid is not None:
        valid = {image: set(student.grid.valid[image].nonzero().flatten().tolist()) for image in images}
    foreground = student.assignment.foreground
    inside, of_levels = set(), []
    for image in images:
        found = {
            "inside_gt": lambda: slow_inside(student, image, points),
            "decouple": lambda: slow_inside(student, image, points),
            "finegrained": lambda: slow_finegrained(student, image, valid[image]),
            "main": lambda: set(foreground[image].nonzero().flatten().tolist()),
            "gibox": set,
        }[name]()
        inside |= {(image, k) for k in found & valid[image]}
    for level, (start, stop) in enumerate(zip(starts, starts[1:])):
        rows = [(image, k - start) for image in images for k in sorted(valid[image]) if start <= k < stop]
        if name == "gibox":
            groups = [[row for row in rows if row[0] == image] for image in images] if per_image else [rows]
            chosen = set().union(*(slow_instances(student, teacher, group, level) for group in groups))
        else:
            chosen = {(image, k) for image, k in rows if (image, k + start) in inside}
        per_cell = (stop - start) // list(student.features.values())[level][0, 0].numel()
        cells = {(image, k // per_cell) for image, k in chosen}
        others = {(image, k // per_cell) for image, k in rows} - cells
        positive = foreground[:, start:stop].any().item()
        of_levels.append((cells, others) if positive and cells else (set(), set()))
    return of_levels


def slow_loss(student, teacher, of_levels, background_weight=0.0):
    total = 0.0
    for ours, theirs, (cells, others) in zip(student.features.values(), teacher.features.values(), of_levels):
        errors = (ours.double() - theirs.double()).flatten(2) ** 2
        total = total + 0 * errors.sum()
        for factor, chosen in ((1.0, cells), (background_weight, others)):
            means = [errors[image, :, cell].mean() for image, cell in chosen]
            total = total + factor * sum(means) / max(len(means), 1)
    return total


@pytest.mark.parametrize("region, student", ALLOWED)
def test_matches_a_loop_over_cells(region, student):
    method = imitation(region, student, ADAPTER=False, BACKGROUND_WEIGHT=0.7)
    ours, theirs = runs(student)
    of_levels = slow_region(region, ours, theirs, per_image=True)
    assert any(cells for cells, _ in of_levels)
    expected = slow_loss(ours, theirs, of_levels, 0.7 if region == "decouple" else 0)
    (loss,) = method(ours, theirs).values()
    torch.testing.assert_close(loss, expected.float())
    maps = list(ours.features.values())
    gradients = torch.autograd.grad(loss, maps, retain_graph=True)
    for gradient, slow in zip(gradients, torch.autograd.grad(expected, maps)):
        torch.testing.assert_close(gradient, slow, rtol=1e-4, atol=1e-8)
    # Other methods still find gradients in what the run keeps.
    assert ours.outputs["logits"].requires_grad


@pytest.mark.parametrize("student", ["RetinaNet", "GFL"])
def test_general_instances_of_the_whole_batch(student):
    ours, theirs = runs(student, inputs=batch() + batch(seed=1))
    losses = []
    for per_image in (False, True):
        method = imitation("gibox", student, ADAPTER=False, GI_PER_IMAGE=per_image)
        of_levels = slow_region("gibox", ours, theirs, per_image)
        assert max(len(cells) for cells, _ in of_levels) > 1
        losses.append(method(ours, theirs)["loss_imitation"])
        torch.testing.assert_close(losses[-1], slow_loss(ours, theirs, of_levels).float())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("region, background_weight", [("inside_gt", 0.0), ("decouple", 2.0)])
def test_two_stage_students(region, background_weight):
    """They have neither anchors nor positives: cells are where their centres are, on all levels."""
    method = imitation(region, "GeneralizedRCNN", ADAPTER=False)
    ours, theirs = runs("GeneralizedRCNN")
    of_levels = []
    for feature, stride in zip(ours.features.values(), (4, 8, 16, 32)):
        rows, columns = feature.shape[2:]
        points = [((x + 0.5) * stride, (y + 0.5) * stride) for y in range(rows) for x in range(columns)]
        cells = {(image, k) for image in range(2) for k in slow_inside(ours, image, points)}
        of_levels.append((cells, {(image, k) for image in range(2) for k in range(len(points))} - cells))
    assert all(cells for cells, _ in of_levels)
    expected = slow_loss(ours, theirs, of_levels, background_weight)
    torch.testing.assert_close(method(ours, theirs)["loss_imitation"], expected.float())


def test_levels_without_positives_are_not_imitated():
    method = imitation("inside_gt", "GFL", ADAPTER=False)
    ours, theirs = runs("GFL", inputs=[image_input(96, 96, [[10, 10, 42, 42]], [0])])
    sizes = ours.grid.level_sizes
    positive = [level.any().item() for level in ours.assignment.foreground.split(sizes, dim=1)]
    inside = slow_inside(ours, 0, ours.grid.centers.tolist())
    # The last level has a cell inside the box, but no positive anchor.
    assert not positive[-1] and max(inside) >= sizes[0] + sizes[1]
    gradients = torch.autograd.grad(method(ours, theirs)["loss_imitation"], list(ours.features.values()))
    assert [gradient.any().item() for gradient in gradients] == positive


def test_padding_is_no_background():
    # Beside a large image a small one is mostly padding.
    inputs = [image_input(96, 96, [[10, 10, 42, 42]], [0]), image_input(32, 32, [[2, 2, 28, 28]], [1])]
    method = imitation("decouple", "GFL", ADAPTER=False)
    ours, theirs = runs("GFL", inputs=inputs)
    (gradient,) = torch.autograd.grad(method(ours, theirs)["loss_imitation"], [ours.features["p3"]])
    assert gradient[0].abs().amin(dim=0).all() and gradient[1, :, :4, :4].abs().amin(dim=0).all()
    assert not gradient[1, :, 4:].any() and not gradient[1, :, :, 4:].any()


@pytest.mark.parametrize("student", ["GFL", "RetinaNet"])
@pytest.mark.parametrize("region", ["whole", *DENSE_REGIONS])
def test_adapters_always_get_a_gradient(region, student):
    """Also from images without any object, which whole maps alone learn from."""
    method = imitation(region, student)
    ours, theirs = runs(student, inputs=[image_input(64, 96), image_input(96, 64)])
    (loss,) = method(ours, theirs).values()
    loss.backward()
    assert loss.isfinite() and (loss > 0) == (region == "whole")
    assert len(method.adapters) == 3
    for parameter in method.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any() == (region == "whole")


@pytest.mark.parametrize("region", DENSE_REGIONS)
def test_a_box_of_a_pixel(region):
    method = imitation(region, "GFL")
    ours, theirs = runs("GFL", inputs=[image_input(64, 96, [[40, 40, 41, 41]], [0]), image_input(96, 64)])
    (loss,) = method(ours, theirs).values()
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_whole_maps_without_adapters():
    method = imitation("whole", "GFL", ADAPTER=False)
    ours, theirs = runs("GFL")
    assert not list(method.parameters())
    expected = sum(F.mse_loss(ours.features[name], theirs.features[name]) for name in ("p3", "p4", "p5"))
    torch.testing.assert_close(method(ours, theirs)["loss_imitation"], expected)


def test_some_levels_alone():
    ours, theirs = runs("GFL")
    terms = [
        imitation("inside_gt", "GFL", ADAPTER=False, IN_FEATURES=names)(ours, theirs)["loss_imitation"]
        for names in (("p3",), ("p4", "p5"), ())
    ]
    assert terms[0] > 0
    torch.testing.assert_close(terms[0] + terms[1], terms[2])


def test_adapters_bridge_channels_in_a_region():
    method = imitation("main", "GFL", "GFL", NARROW)
    ours, _ = runs("GFL")
    narrow = stage_detector(build(detector_cfg("GFL", **NARROW), 1))
    theirs = narrow.run(ours.images, ours.gt_instances, frozen=True)
    (loss,) = method(ours, theirs).values()
    assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("region", ["decouple", "gibox"])
def test_training_step(region, tmp_path):
    """In the distiller, whose first steps check that a term is finite and reaches the student."""
    teacher = save_teacher(tmp_path, "GFL")
    overrides = {"DISTILL__IMITATION__REGION": region, "DISTILL__IMITATION__ADAPTER": True}
    model = Distiller(distiller_cfg("GFL", teacher, ["FeatureImitation"], **overrides)).prepare_training().train()
    with EventStorage():
        losses = model([image_input(64, 96), image_input(96, 64)])
        assert losses["loss_imitation"] == 0
        losses = model(batch())
    assert losses["loss_imitation"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_maps_of_another_size():
    method = imitation("inside_gt", "GFL", ADAPTER=False)
    ours, _ = runs("GFL")
    larger = [{**x, "image": F.pad(x["image"], (0, 32, 0, 32))} for x in batch()]
    theirs = staged("GFL", 1).run(staged("GFL", 1).preprocess(larger), ours.gt_instances, frozen=True)
    message = r"student's p3 is of size \(12, 12\) and the teacher's p3 of \(16, 16\), .* only 'whole' res"
    with pytest.raises(UserError, match=message):
        method(ours, theirs)


ANCHORS = {"GFL__ANCHOR_SCALE": 8}
CLASSES = {"GFL__NUM_CLASSES": 5}
STRIDES = {"GFL__IN_FEATURES": ["p3", "p4"]}


@pytest.mark.parametrize(
    "region, student, teacher, theirs, message",
    [
        ("fitnet", "GFL", "GFL", {}, "REGION is 'fitnet'; choose from whole, inside_gt, .*, main"),
        (
            "main", "GeneralizedRCNN", "GFL", {},
            "'main' needs a one-stage student, but the student is GeneralizedRCNN .student GeneralizedRCNN, "
            "teacher GFL.; 'whole', 'inside_gt' and 'decouple' work for any pair",
        ),
        ("finegrained", "GeneralizedRCNN", "GeneralizedRCNN", {}, "'finegrained' needs a one-stage student"),
        ("finegrained", "FCOS", "GFL", {}, "student FCOS .teacher GFL. assigns points; choose 'inside_gt'"),
        ("gibox", "GFL", "GeneralizedRCNN", {}, "one-stage student and teacher, but the teacher is Gen"),
        ("gibox", "GFL", "FCOS", {}, "'gibox' .* anchors of the student .GFL. and the teacher .FCOS. differ"),
        ("gibox", "GFL", "GFL", ANCHORS, "REGION 'gibox' compares predictions anchor by anchor, but"),
        ("gibox", "GFL", "GFL", STRIDES, "REGION 'gibox' compares predictions location by location, but"),
        ("gibox", "GFL", "GFL", CLASSES, "REGION 'gibox' .* the student has 3 classes and the teacher 5"),
    ],
)
def test_pairs_and_regions_that_are_refused(region, student, teacher, theirs, message):
    with pytest.raises(UserError, match=message):
        imitation(region, student, teacher, theirs)


@pytest.mark.parametrize("region", ["whole", "inside_gt"])
def test_without_adapters_channels_must_agree(region):
    message = "student's p3 has 32 channels and the teacher's p3 has 16; .* set MODEL.DISTILL.IMITATION.ADAPTER to True"
    with pytest.raises(UserError, match=message):
        imitation(region, "GFL", "GFL", NARROW, ADAPTER=False)


@pytest.mark.parametrize(
    "region, student, teacher",
    [
        ("inside_gt", "GeneralizedRCNN", "GFL"),
        ("decouple", "GFL", "GeneralizedRCNN"),
        ("finegrained", "RetinaNet", "GeneralizedRCNN"),
        ("main", "FCOS", "GFLv2"),
        ("gibox", "GFL", "GFLv2"),
        ("gibox", "ATSS", "GFL"),
    ],
)
def test_pairs_of_different_detectors(region, student, teacher):
    (loss,) = imitation(region, student, teacher)(*runs(student, teacher)).values()
    assert loss.isfinite() and loss > 0
