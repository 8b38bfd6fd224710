"""CrossKD: what its terms depend on, which parameters they teach, and which detectors can be paired."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.engine.trainer import build_checkpointer
from d2_distill.errors import UserError
from d2_distill.losses import align_statistics
from d2_distill.methods import build_methods
from d2_distill.staged import Tap, stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import (
    ONE_STAGE,
    all_taps,
    batch,
    build,
    detector_cfg,
    distiller_cfg,
    image_input,
    save_teacher,
)

PADDED_ALIKE = [case for case in ONE_STAGE if case != "MultiScaleDetector"]
HEADS = ["RetinaNet", "OpenMMLabRetinaNet", "GFL", "GFLv2", "ATSS", "OpenMMLabFCOS", "FCOS"]
WITH_CENTERNESS = ("ATSS", "FCOS", "OpenMMLabFCOS")
BOTH = {"loss_crosskd_cls", "loss_crosskd_box"}
CENTERNESS = "loss_crosskd_centerness"
WIDE = {"FPN__OUT_CHANNELS": 64}  # also GroupNorm of a single cell needs more channels than groups
BATCHES = {
    "two images": batch(),
    "padding": [image_input(96, 64, [[8, 16, 40, 80]], [1]), *batch()[:1]],
    "no boxes": [image_input(64, 96), image_input(96, 64, seed=1)],
    "an image without boxes": [image_input(64, 96), *batch()],
    # No anchor overlaps a box of 3 pixels enough to be positive.
    "tiny box": [image_input(96, 96, [[40, 40, 43, 43]], [1])],
    # The last level is one cell of one image: N*H*W = 1.
    "one cell": [image_input(32, 32, [[4, 4, 24, 24]], [1])],
}


@functools.lru_cache(maxsize=None)
def model_of(role: str, case: str, salt: int, wide: bool):
    """Built once: no test changes it."""
    model = build(detector_cfg(case, **(WIDE if wide else {})), salt).train()
    staged = stage_detector(model)
    with torch.no_grad():
        if staged.reg_max:
            model.head.bbox_pred.weight *= 30  # distributions that differ by more than rounding
        elif case == "FCOS":
            model.head.bbox_pred.bias += 3  # its distances are clamped at 0: boxes without area match none
        elif case == "TOOD":  # negative scales and sides from far away make boxes without area
            for parameter in model.head.scales.parameters():
                parameter.fill_(1)
            for parameter in model.head.bbox_alignment[-1].parameters():
                parameter *= 0.02
    return Teacher(model, input_format="BGR") if role == "teacher" else staged


@functools.lru_cache(maxsize=None)
def run_of(role: str, case: str, salt: int, wide: bool, inputs: str):
    """A run of a detector with all its taps; its graph is kept for all tests."""
    model = model_of(role, case, salt, wide)
    staged = model.staged if role == "teacher" else model
    images, gt_instances = staged.preprocess(BATCHES[inputs]), [x["instances"] for x in BATCHES[inputs]]
    run = staged.run(images, gt_instances, taps=all_taps(staged), frozen=role == "teacher")
    assert run.taps and run.outputs and run.assignment  # computed here, so that copies share them
    return run


@functools.lru_cache(maxsize=None)
def cfg_of(options):
    options = {f"DISTILL__CROSSKD__{key}": value for key, value in options}
    return distiller_cfg("RetinaNet", None, ["CrossKD"], **options)


class Pair:
    """CrossKD with a student and a teacher of other weights (or of the same), and runs of both."""

    def __init__(
        self, case: str = "RetinaNet", teacher: str = "", *, salt: int = 2, wide=(False, False), **options
    ) -> None:
        self.sides = [("student", case, salt, wide[0]), ("teacher", teacher or case, 1, wide[1])]
        self.student, self.teacher = (model_of(*side) for side in self.sides)
        cfg = cfg_of(tuple(options.items()))
        self.method = build_methods(cfg, self.student, self.teacher)["CrossKD"]

    def runs(self, inputs: str = "two images"):
        """Copies, in which stages may be replaced."""
        return [copy.copy(run_of(*side, inputs)) for side in self.sides]

    def terms(self, inputs: str = "two images"):
        return self.method(*self.runs(inputs))


def gradients(total: torch.Tensor, wanted):
    return torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True)


def taps(position: int, **others):
    return {"CLS_TAP": position, "BOX_TAP": position, **others}


@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("tap", [0, 1, 2])
@pytest.mark.parametrize("case", [*HEADS, "TOOD"])
def test_equal_detectors_have_nothing_to_learn(case, tap, activation):
    options = taps(tap, TAP_ACTIVATION=activation)
    same, other = Pair(case, salt=1, **options).terms(), Pair(case, **options).terms()
    assert set(same) == set(other) == BOTH
    for term in BOTH:
        assert abs(same[term]) < 1e-4 * other[term]


@pytest.mark.parametrize("box_loss", ["giou", "iou", "linear_iou", "diou", "ciou"])
@pytest.mark.parametrize("case", ["GFL", "ATSS"])
def test_losses_of_decoded_boxes(case, box_loss):
    same, other = (Pair(case, salt=salt, BOX_LOSS=box_loss).terms()["loss_crosskd_box"] for salt in (1, 2))
    assert other > 0 and abs(same) < 1e-4 * other


def test_distributions_are_compared_as_such_by_default():
    for case, chosen, other in (("GFL", "kl", "giou"), ("ATSS", "giou", "iou")):
        default, same, different = (
            Pair(case, BOX_LOSS=name).terms()["loss_crosskd_box"] for name in ("auto", chosen, other)
        )
        assert torch.equal(default, same) and not torch.isclose(default, different)


@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("tap", [0, 1, 2])
@pytest.mark.parametrize("case", ["RetinaNet", "GFL"])
def test_scale_and_shift_of_the_students_tap_do_not_matter(case, tap, activation):
    pair = Pair(case, **taps(tap, TAP_ACTIVATION=activation))
    ours, theirs = pair.runs()
    expected = pair.method(ours, theirs)
    torch.manual_seed(0)
    scale, shift = torch.rand(1, 32, 1, 1) * 5 + 0.2, torch.randn(1, 32, 1, 1)
    ours.taps = {
        branch: {place: [x * scale + shift for x in levels] for place, levels in kept.items()}
        for branch, kept in ours.taps.items()
    }
    for term, value in pair.method(ours, theirs).items():
        torch.testing.assert_close(value, expected[term], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cls_tap, box_tap", [(0, 1), (1, 2), (2, 0)])
@pytest.mark.parametrize("case", HEADS)
def test_only_what_lies_in_front_of_the_tap_is_taught(case, cls_tap, box_tap):
    centerness = 1.0 if case in WITH_CENTERNESS else 0.0
    pair = Pair(case, CLS_TAP=cls_tap, BOX_TAP=box_tap, CENTERNESS_WEIGHT=centerness)
    ours, theirs = pair.runs()
    head = dict(pair.student.model.head.named_parameters())
    *found, to_features = gradients(
        sum(pair.method(ours, theirs).values()), [*head.values(), ours.features["p3"]]
    )
    in_front = set()
    for branch, position in (("cls", cls_tap), ("box", box_tap)):
        tower = pair.student.towers[branch]
        for layer in tower.layers[: len(tower.layers) * position // len(tower)]:
            in_front |= {id(p) for p in layer.parameters()}
    for (name, parameter), gradient in zip(head.items(), found):
        assert (gradient is not None and gradient.any()) == (id(parameter) in in_front), name
    assert to_features.any() and in_front
    assert not any(p.requires_grad for p in pair.teacher.model.parameters())


@pytest.mark.parametrize("case", HEADS)
def test_each_term_teaches_its_own_branch(case):
    pair = Pair(case)
    head, terms = pair.student.model.head, pair.terms()
    for term, (taught, other) in {
        "loss_crosskd_cls": (head.cls_subnet[0], head.bbox_subnet[0]),
        "loss_crosskd_box": (head.bbox_subnet[0], head.cls_subnet[0]),
    }.items():
        found, missing = gradients(terms[term], [taught.weight, other.weight])
        assert found.any() and missing is None


@pytest.mark.parametrize("key, branch", [("CLS", "cls"), ("BOX", "box")])
@pytest.mark.parametrize("case", ["RetinaNet", "GFL"])
def test_one_term_alone(case, key, branch):
    both = Pair(case).terms()
    other = {"CLS": "BOX", "BOX": "CLS"}[key]
    # A tap that no term reads may not even exist; its branch needs no adapter either.
    pair = Pair(case, **{f"{other}_WEIGHT": 0.0, f"{other}_TAP": 9})
    alone = pair.terms()
    assert set(alone) == {f"loss_crosskd_{branch}"} and pair.method.taps() == {branch: {Tap(1)}}
    assert all(torch.equal(value, both[term]) for term, value in alone.items())
    assert list(Pair(case, wide=(True, False), **{f"{other}_WEIGHT": 0.0}).method.adapters) == [branch]


def test_temperature_softens_the_distributions():
    one, four = (Pair("GFL", BOX_TEMPERATURE=t).terms()["loss_crosskd_box"] for t in (1.0, 4.0))
    assert 0 < four / 16 < one


# Against loops over single anchors.


def align(ours, theirs):
    """(N, C, H, W) in the teacher's statistics, behind a ReLU."""
    rows, others = (x.detach().double().transpose(0, 1).flatten(1) for x in (ours, theirs))
    aligned = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)
    aligned = aligned * others.std(1, keepdim=True) + others.mean(1, keepdim=True)
    return aligned.clamp(min=0).unflatten(1, (len(ours), *ours.shape[2:])).transpose(0, 1)


def slow_outputs(pair, ours, theirs):
    """Output -> (crossed, own), each (N, R, K) in float64, from the layers of the teacher's head."""
    model = copy.deepcopy(pair.teacher.model).double()
    head, staged = model.head, pair.teacher.staged
    layers = {"logits": head.cls_score, "deltas": head.bbox_pred}
    if "centerness" in staged.predictors:
        layers["centerness"] = head.ctrness
    found = {}
    for output, predictor in staged.predictors.items():
        [(branch, _)] = predictor.reads
        subnet = head.cls_subnet if branch == "cls" else head.bbox_subnet
        both = []
        for crossing in (True, False):
            rows = []
            for level, (x, y) in enumerate(zip(ours.taps[branch][Tap(1)], theirs.taps[branch][Tap(1)])):
                x = align(x, y) if crossing else y.double()
                maps = layers[output](subnet[len(subnet) // 2 :](x)).detach()
                if output == "deltas" and getattr(head, "scales", None) is not None:
                    maps = maps * head.scales[level].scale.detach()
                anchors = theirs.grid.anchors_per_cell
                size = maps.shape[1] // anchors
                for i in range(maps.shape[2]):
                    for j in range(maps.shape[3]):
                        rows += [maps[:, a * size : (a + 1) * size, i, j] for a in range(anchors)]
            both.append(torch.stack(rows, dim=1))
        found[output] = both
    return found


def slow_box(case, anchor, outputs):
    """XYXY of one anchor."""
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    a, b, c, d = outputs.tolist()
    if case == "OpenMMLabFCOS":
        left, top, right, bottom = (math.exp(value) for value in (a, b, c, d))
        return x - left, y - top, x + right, y + bottom
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    if case == "ATSS":
        a, b, c, d = a / 10, b / 10, c / 5, d / 5
    bound = math.log(1000 / 16)
    half_width, half_height = (
        side * math.exp(min(max(scale, -bound), bound)) / 2 for side, scale in ((width, c), (height, d))
    )
    x, y = x + a * width, y + b * height
    return x - half_width, y - half_height, x + half_width, y + half_height


def slow_giou_loss(box, other):
    def area(left, top, right, bottom):
        return max(right - left, 0) * max(bottom - top, 0)

    inner = [*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:])]
    hull = area(*map(min, box[:2], other[:2]), *map(max, box[2:], other[2:]))
    union = area(*box) + area(*other) - area(*inner)
    return 1 - area(*inner) / union + (hull - union) / hull


def slow_centerness(anchor, box):
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def binary_entropy(y, p):
    return -(y * p.log() + (1 - y) * (1 - p).log())


@pytest.mark.parametrize("case", ["OpenMMLabRetinaNet", "GFL", "ATSS", "OpenMMLabFCOS"])
def test_terms_are_sums_over_anchors(case):
    """The whole method again, anchor by anchor in float64; no function of it shared."""
    centerness = case == "ATSS"
    pair = Pair(case, CENTERNESS_WEIGHT=float(centerness))
    ours, theirs = pair.runs()
    terms, outputs = pair.method(ours, theirs), slow_outputs(pair, ours, theirs)
    labels, anchors = ours.assignment.labels.tolist(), theirs.grid.boxes.tolist()
    scores = [x.sigmoid() for x in outputs["logits"]]
    sums, of_confidence, normalizer, positives = dict.fromkeys(terms, 0.0), 0.0, 0.0, 0
    for image, row in enumerate(labels):
        found = 0.0
        for index, label in enumerate(row):
            if label < 0:
                continue
            p, y = (x[image, index] for x in scores)
            sums["loss_crosskd_cls"] += (binary_entropy(y, p) * (p - y).abs()).sum().item()
            r = y.max().item()
            of_confidence += r
            crossed, own = (x[image, index] for x in outputs["deltas"])
            if case == "GFL":
                crossed, own = (x.view(4, 17).softmax(dim=1) for x in (crossed, own))
                sums["loss_crosskd_box"] += r * (own * (own / crossed).log()).sum().item() / 4
            else:
                boxes = (slow_box(case, anchors[index], x) for x in (crossed, own))
                sums["loss_crosskd_box"] += r * slow_giou_loss(*boxes)
            if label < 3:
                positives += 1
                box = ours.assignment.boxes[image, index].tolist()
                found += slow_centerness(anchors[index], box) if case == "OpenMMLabFCOS" else 1
                if centerness:
                    p, y = (x[image, index, 0].sigmoid() for x in outputs["centerness"])
                    sums[CENTERNESS] += binary_entropy(y, p).item()
        normalizer += found if case == "OpenMMLabFCOS" else max(found, 1)
    assert positives > 2 and normalizer > 1 and all(value > 0 for value in sums.values())
    assert any(label < 0 for row in labels for label in row) == (case != "OpenMMLabFCOS")
    for term, value in sums.items():
        value /= of_confidence if term == "loss_crosskd_box" and case == "GFL" else normalizer
        assert terms[term].item() == pytest.approx(value, rel=1e-4), term


@pytest.mark.parametrize("case", ["RetinaNet", "ATSS"])
def test_ignored_anchors_teach_nothing(case):
    """The sums over the even and over the odd anchors make up the sum over all."""
    pair = Pair(case)
    ours, theirs = pair.runs()
    every = ours.assignment
    expected = {term: value * every.normalizer for term, value in pair.method(ours, theirs).items()}
    odd = torch.arange(every.labels.shape[1]) % 2
    halves = []
    for half in (0, 1):
        ours.assignment = dataclasses.replace(every, labels=every.labels.where(odd == half, -1))
        terms = pair.method(ours, theirs)
        halves.append({term: value * ours.assignment.normalizer for term, value in terms.items()})
    for term in BOTH:
        assert halves[0][term] > 0 and halves[1][term] > 0
        torch.testing.assert_close(halves[0][term] + halves[1][term], expected[term])


@pytest.mark.parametrize("case", ["OpenMMLabRetinaNet", "ATSS", "GFL", "OpenMMLabFCOS"])
def test_padding_counts_for_points_alone(case):
    """What lies at cells that are only padding changes the terms of FCOS, and no other's."""
    pair = Pair(case)
    ours, theirs = pair.runs("padding")
    expected = pair.method(ours, theirs)
    # The first image is 64 pixels wide; the batch, 96.
    theirs.outputs = {name: x.clone() for name, x in theirs.outputs.items()}
    for output in theirs.outputs.values():
        for level, x in enumerate(theirs.grid.split(output)):
            cells = x[0].view(12 >> level, 12 >> level, -1)
            cells[:, 8 >> level :] += 1
    for term, value in pair.method(ours, theirs).items():
        assert torch.isclose(value, expected[term]) == (case != "OpenMMLabFCOS")


@pytest.mark.parametrize("inputs", ["no boxes", "an image without boxes", "tiny box", "one cell"])
@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("case", HEADS)
def test_few_or_no_positives_stay_finite(case, activation, inputs):
    centerness = 1.0 if case in WITH_CENTERNESS else 0.0
    wide = (inputs == "one cell",) * 2
    pair = Pair(case, wide=wide, TAP_ACTIVATION=activation, CENTERNESS_WEIGHT=centerness)
    ours, theirs = pair.runs(inputs)
    terms = pair.method(ours, theirs)
    assert set(terms) == BOTH | ({CENTERNESS} if centerness else set())
    assert all(term.isfinite() and term >= 0 for term in terms.values())
    found = gradients(sum(terms.values()), ours.features.values())
    assert found[0].any() and all(gradient.isfinite().all() for gradient in found)


def test_an_image_without_positives_counts_as_one():
    assert Pair().runs("no boxes")[0].assignment.normalizer == 2


@pytest.mark.parametrize("case", ["FCOS", "OpenMMLabFCOS"])
def test_floor_of_the_sum_of_centerness(case):
    """Without positives the published floor blows the terms up; with some it does nothing."""
    terms = {
        (floor, name): Pair(case, NORMALIZER_FLOOR=floor).terms(inputs)
        for floor in (1.0, 1e-6)
        for name, inputs in (("empty", "no boxes"), ("boxes", "two images"))
    }
    for term in BOTH:
        # The eps that is added to the normalizer is not small beside 1e-6.
        torch.testing.assert_close(terms[1e-6, "empty"][term], terms[1.0, "empty"][term] / 1.1192093e-06)
        assert torch.equal(terms[1e-6, "boxes"][term], terms[1.0, "boxes"][term])


def test_whose_normalizers_are_averaged_over_processes(monkeypatch):
    local = set()
    for case in [*HEADS, "TOOD"]:
        run = Pair(case).runs()[0]
        counted = []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_reduce", counted.append)
        run.staged.normalizer(run.grid, run.assignment)
        monkeypatch.undo()
        if not counted:
            local.add(case)
    assert local == {"RetinaNet"}


# Towers that classes and boxes share.


@pytest.mark.parametrize("student", ["GFL", "TOOD"])
@pytest.mark.parametrize("tap", [0, 1, 2])
def test_a_predictor_reads_the_teachers_own_features_before_the_tap(student, tap):
    """TOOD predicts from all blocks of its tower, the first of which lies before the second tap."""
    pair = Pair(student, "TOOD", **taps(tap))
    ours, theirs = pair.runs()
    crossed, head = pair.method.crossed_outputs(ours, theirs), pair.teacher.model.head
    for output in ("logits", "deltas"):
        maps, own = [], theirs.taps["shared"]
        for level, x in enumerate(ours.taps[ours.staged.branch_of(output)][Tap(tap)]):
            x = align_statistics(x, own[Tap(tap)][level]).detach()
            x = x.relu() if tap else x
            first = own[Tap(1)][level] if tap == 2 else x if tap == 1 else head.subnet[:3](x)
            second = x if tap == 2 else head.subnet[3:](first)
            maps.append(head.predict(output, [first, second], level))
        torch.testing.assert_close(crossed[output], theirs.grid.join(maps))


def test_a_shared_tower_is_crossed_once_if_the_taps_agree():
    assert {name: crossing.outputs for name, crossing in Pair("TOOD").method.crossings.items()} == {
        "cls": ("logits", "deltas")
    }
    apart = Pair("TOOD", CLS_TAP=1, BOX_TAP=2)
    assert {name: crossing.outputs for name, crossing in apart.method.crossings.items()} == {
        "cls": ("logits",), "box": ("deltas",)
    }
    assert apart.method.taps() == {"shared": {Tap(1), Tap(2)}}
    assert all(term > 0 for term in apart.terms().values())


# Pairs of different detectors.


@pytest.mark.parametrize("teacher", PADDED_ALIKE)
def test_every_teacher_teaches_every_student(teacher):
    theirs = model_of("teacher", teacher, 1, False)
    fingerprint = theirs.fingerprint()
    for student in PADDED_ALIKE:
        pair = Pair(student, teacher)
        ours, theirs = pair.runs()
        terms = pair.method(ours, theirs)
        assert set(terms) == BOTH
        for term, output in (("loss_crosskd_cls", "logits"), ("loss_crosskd_box", "deltas")):
            assert terms[term].isfinite() and terms[term] > 0, student
            for gradient in gradients(terms[term], ours.taps[ours.staged.branch_of(output)][Tap(1)]):
                assert gradient.isfinite().all() and gradient.any(), student
        mine, other = ours.grid.boxes, theirs.grid.boxes
        assert pair.method.shares_anchors == (mine.shape == other.shape and torch.equal(mine, other))
    assert pair.teacher.fingerprint() == fingerprint


def test_other_anchors_take_the_normalizer_of_the_student_and_the_padding_of_the_teacher():
    pair = Pair("OpenMMLabFCOS", "ATSS")
    ours, theirs = pair.runs()
    assert not pair.method.shares_anchors and (~theirs.grid.valid).any()
    expected = pair.method(ours, theirs)["loss_crosskd_cls"]
    # Twice the positives halve the term, in whatever rows they are.
    labels, boxes = ours.assignment.labels, ours.assignment.boxes
    ours.assignment = dataclasses.replace(
        ours.assignment, labels=torch.cat([labels] * 2), boxes=torch.cat([boxes] * 2)
    )
    torch.testing.assert_close(pair.method(ours, theirs)["loss_crosskd_cls"], expected / 2)
    grid = theirs.grid
    theirs.grid = dataclasses.replace(grid)
    vars(theirs.grid)["valid"] = ~grid.valid
    masked = pair.method(ours, theirs)["loss_crosskd_cls"]
    theirs.grid = dataclasses.replace(grid, image_sizes=None)
    torch.testing.assert_close(pair.method(ours, theirs)["loss_crosskd_cls"], masked + expected / 2)


def test_gflv2_has_an_output_that_is_no_class():
    pair = Pair("GFL", "GFLv2")
    ours, theirs = pair.runs()
    expected = pair.method(ours, theirs)
    logits = torch.cat([theirs.outputs["logits"][..., :3], theirs.outputs["logits"][..., 3:] + 5], dim=-1)
    theirs.outputs = {**theirs.outputs, "logits": logits}
    for term, value in pair.method(ours, theirs).items():
        assert torch.equal(value, expected[term])


@pytest.mark.parametrize("case, teacher", [("GFL", "GFL"), ("RetinaNet", "ATSS")])
@pytest.mark.parametrize("tap", [0, 1])
def test_adapters_bridge_channels(case, teacher, tap):
    assert not Pair(case, teacher, **taps(tap)).method.adapters
    pair = Pair(case, teacher, wide=(True, False), **taps(tap))
    adapters = pair.method.adapters
    assert {name: tuple(x.shape) for name, x in pair.method.state_dict().items()} == {
        f"adapters.{branch}.weight": (32, 64, 1, 1) for branch in ("cls", "box")
    }
    ours, theirs = pair.runs()
    terms = pair.method(ours, theirs)
    wanted = [adapters["cls"].weight, adapters["box"].weight, *ours.features.values()]
    for gradient in gradients(sum(terms.values()), wanted):
        assert gradient.any() and gradient.isfinite().all()
    # The same as a student whose taps are adapted already.
    plain = Pair(case, teacher, **taps(tap)).method
    ours.taps = {
        branch: {Tap(tap): [adapter(x) for x in ours.taps[branch][Tap(tap)]]}
        for branch, adapter in adapters.items()
    }
    for term, value in plain(ours, theirs).items():
        torch.testing.assert_close(value, terms[term])


def test_adapters_are_trained_and_saved_beside_the_student(tmp_path):
    cfg = distiller_cfg("RetinaNet", save_teacher(tmp_path, "GFL"), ["CrossKD"], FPN__OUT_CHANNELS=16)
    distiller = build_model(cfg).prepare_training().train()
    with EventStorage():
        losses = distiller(batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)
    build_checkpointer(distiller, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert set(saved["distill"]) == {f"CrossKD.adapters.{branch}.weight" for branch in ("cls", "box")}
    assert set(saved["model"]) == set(distiller.student.state_dict())


def test_maps_of_different_sizes_are_refused():
    pair = Pair("RetinaNet")
    (ours, _), (_, theirs) = pair.runs("two images"), pair.runs("one cell")
    with pytest.raises(UserError, match=r"level 0 is of size \(12, 12\) in the student and \(4, 4\) in the"):
        pair.method(ours, theirs)
