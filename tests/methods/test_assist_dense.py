"""HEAD between one-stage detectors of different kinds: which towers imitate which, and what they teach."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.assistants.dense import tower_ends
from d2_distill.distiller import Distiller, wanted_taps
from d2_distill.errors import UserError
from d2_distill.methods.assist_dense import SameLevels
from d2_distill.methods.assistance import mimicry_loss
from d2_distill.staged import Tap

from ..small_detectors import batch, distiller_cfg, image_input, save_teacher

KINDS = ("RetinaNet", "RetinaNet BN", "FCOS", "OpenMMLabFCOS", "ATSS", "GFLv2", "TOOD")
PAIRS = [pair for pair in itertools.product(("RetinaNet", "FCOS", "GFL"), KINDS) if pair[0] != pair[1]]
PAIRS += [("TOOD", "ATSS"), ("TOOD", "TOOD")]
TERMS = {"loss_assist", "loss_akd", "loss_ckd"}
NO_BOXES = [image_input(64, 96), image_input(96, 64, seed=1)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers by case; "wide" has another number of channels."""
    folder = tmp_path_factory.mktemp
    saved = {kind: save_teacher(folder("teacher"), kind) for kind in KINDS}
    saved["wide"] = save_teacher(folder("teacher"), "GFL", FPN__OUT_CHANNELS=64)
    saved["deep"] = save_teacher(folder("teacher"), "GFL", GFL__NUM_CONVS=3)
    return saved


def distiller_of(case, teacher, below=None, **options) -> Distiller:
    keys = {f"DISTILL__HEAD__{key}": value for key, value in options.items()}
    torch.manual_seed(0)
    return build_model(distiller_cfg(case, teacher, ["HEAD"], **{**(below or {}), **keys})).prepare_training().train()


class Step:
    """Runs of student and teacher, and what the setting makes of them."""

    def __init__(self, model: Distiller, inputs=None) -> None:
        inputs = batch() if inputs is None else inputs
        self.setting = model.methods["HEAD"].setting
        images, gt_instances = model.staged.preprocess(inputs), [x["instances"] for x in inputs]
        taps = wanted_taps(model.methods.values())
        self.student = model.staged.run(images, gt_instances, taps=taps)
        self.teacher = model.teacher.staged.run(images, gt_instances, taps=taps, frozen=True)
        self.setting.assistant.register_forward_hook(lambda _, given, made: setattr(self, "assistant", made))
        with EventStorage():
            self.assistance = self.setting(self.student, self.teacher)


def gradients(total, wanted):
    return torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("case, teacher", PAIRS)
def test_every_pair(case, teacher, teachers):
    model = distiller_of(case, teachers[teacher])
    assert isinstance(model.methods["HEAD"].setting, SameLevels)
    fingerprint = model.teacher.fingerprint()
    for inputs in (batch(), NO_BOXES):
        with EventStorage(1):
            losses = model(inputs)
        assert TERMS <= set(losses) and all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
        model.zero_grad()
    assert model.teacher.fingerprint() == fingerprint
    assert all(p.grad is None for p in model.teacher.model.parameters())


def slow(adapter: nn.Conv2d, ours, theirs) -> torch.Tensor:
    """The sum over levels of the mean squared error, cell by cell in float64."""
    weight, bias, total = adapter.weight[:, :, 0, 0].double(), adapter.bias.double(), 0.0
    for x, y in zip(ours, theirs):
        cells, targets = (z.double().permute(0, 2, 3, 1).flatten(end_dim=2) for z in (x, y))
        errors = [(weight @ cell + bias - target).square().mean() for cell, target in zip(cells, targets)]
        total = total + torch.stack(errors).mean()
    return total


@pytest.mark.parametrize("tap", [-1, 0, 1, 2])
def test_ends_of_towers_imitate_the_teachers(tap, teachers):
    step = Step(distiller_of("RetinaNet", teachers["OpenMMLabFCOS"], CKD_TAP=tap))
    place = Tap(2 if tap == -1 else tap)
    akd, ckd = 0.0, 0.0
    for branch in ("cls", "box"):
        targets = tower_ends(step.teacher, branch)
        akd = akd + slow(step.setting.akd[branch], tower_ends(step.assistant, branch), targets)
        ours = list(step.student.features.values()) if tap == 0 else step.student.taps[branch][place]
        ckd = ckd + slow(step.setting.ckd[branch], ours, targets)
    assert len(step.assistance.akd) == len(step.assistance.ckd) == 2 * 3
    for pairs, expected in ((step.assistance.akd, akd), (step.assistance.ckd, ckd)):
        found = mimicry_loss(pairs)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        wanted = list(step.student.features.values())
        for mine, other in zip(gradients(found, wanted), gradients(expected, wanted)):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(
    "case, teacher, akd, ckd",
    [
        ("RetinaNet", "TOOD", ["cls"], ["cls", "box"]),
        ("TOOD", "ATSS", ["cls", "box"], ["cls", "box"]),
        ("TOOD", "TOOD", ["cls"], ["cls"]),
    ],
)
@pytest.mark.parametrize("tap", [-1, 1])
def test_a_tower_that_both_tasks_share(case, teacher, akd, ckd, tap, teachers):
    """It stands for both, but two of them are compared once."""
    step = Step(distiller_of(case, teachers[teacher], CKD_TAP=tap))
    assert (list(step.setting.akd), list(step.setting.ckd)) == (akd, ckd)
    ours, theirs = (run.staged.towers for run in (step.student, step.teacher))
    assert step.setting.taps() == ({} if tap == -1 else dict.fromkeys(ours, {Tap(1)}))
    expected = 0.0
    for name in ckd:
        mine, other = (name if name in towers else "shared" for towers in (ours, theirs))
        features = step.student.taps[mine][Tap(2 if tap == -1 else 1)]
        expected = expected + slow(step.setting.ckd[name], features, tower_ends(step.teacher, other))
    torch.testing.assert_close(mimicry_loss(step.assistance.ckd).double(), expected, rtol=1e-4, atol=1e-6)


def test_who_learns_from_which_term(teachers):
    step = Step(distiller_of("RetinaNet", teachers["ATSS"]))
    ours, theirs = step.student.staged.model.head, step.setting.assistant.detector.head
    towers = [[*head.cls_subnet.parameters(), *head.bbox_subnet.parameters()] for head in (ours, theirs)]
    for pairs, (taught, other), adapters in (
        (step.assistance.akd, towers[::-1], step.setting.akd),
        (step.assistance.ckd, towers, step.setting.ckd),
    ):
        loss = mimicry_loss(pairs)
        found = gradients(loss, [*taught, *adapters.parameters(), step.student.features["p3"]])
        assert all(gradient.any() for gradient in found)
        assert set(gradients(loss, other)) == {None}
    labels = sum(step.assistance.losses.values())
    assert set(gradients(labels, ours.parameters())) == {None}
    assert all(x is not None for x in gradients(labels, theirs.parameters()))


@pytest.mark.parametrize("init", ["teacher", "fresh"])
def test_what_the_assistant_starts_from(init, teachers):
    model = distiller_of("RetinaNet", teachers["ATSS"], ASSISTANT_INIT=init)
    ours = model.methods["HEAD"].setting.assistant.detector.head.state_dict()
    theirs = model.teacher.model.head.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) == (init == "teacher")
    assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in theirs.values()}


@pytest.mark.parametrize(
    "options, terms",
    [
        ({"AKD_WEIGHT": 0.0}, TERMS - {"loss_akd"}),
        ({"CKD_WEIGHT": 0.0, "CKD_TAP": 9}, TERMS - {"loss_ckd"}),
        ({"AKD_WEIGHT": 0.0, "CKD_WEIGHT": 0.0}, {"loss_assist"}),
    ],
)
def test_parts_that_are_left_out_have_no_adapters(options, terms, teachers):
    model = distiller_of("RetinaNet", teachers["ATSS"], **options)
    setting = model.methods["HEAD"].setting
    assert bool(setting.akd) == ("loss_akd" in terms) and bool(setting.ckd) == ("loss_ckd" in terms)
    with EventStorage(1):
        losses = model(batch())
    assert {name for name in losses if name in TERMS} == terms
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_other_channels_need_a_fresh_assistant(teachers):
    with pytest.raises(UserError, match="cannot start as a copy.*FPN.OUT_CHANNELS.*_INIT to 'fresh'"):
        distiller_of("RetinaNet", teachers["wide"])
    step = Step(distiller_of("RetinaNet", teachers["wide"], ASSISTANT_INIT="fresh"))
    pairs = step.assistance.akd + step.assistance.ckd
    assert {tuple(x.shape[:2]) for pair in pairs for x in pair} == {(2, 64)}
    assert step.setting.akd["cls"].weight.shape == step.setting.ckd["box"].weight.shape == (64, 32, 1, 1)


def test_towers_may_differ_in_length(teachers):
    """The end is wanted of the student's towers alone."""
    for below in ({}, {"RETINANET__NUM_CONVS": 4}):
        step = Step(distiller_of("RetinaNet", teachers["deep"], below))
        assert len(step.student.staged.towers["cls"]) != len(step.teacher.staged.towers["cls"]) == 3
        assert len(step.assistance.ckd) == 6


@pytest.mark.parametrize("tap", [-2, 3])
def test_taps_outside_of_the_towers_are_refused(tap, teachers):
    message = f"MODEL.DISTILL.HEAD.CKD_TAP is {tap}; .*have 2 and 3 blocks .*between 0 and 2, or be -1"
    with pytest.raises(UserError, match=message):
        distiller_of("RetinaNet", teachers["deep"], CKD_TAP=tap)


def test_heads_of_other_strides_are_refused(teachers):
    below = {"RETINANET__IN_FEATURES": ["p3", "p4"], "ANCHOR_GENERATOR__SIZES": [[16], [32]]}
    message = r"HEAD compares .*reads strides \[8, 16\] and the teacher's \[8, 16, 32\]"
    with pytest.raises(UserError, match=message):
        distiller_of("RetinaNet", teachers["ATSS"], below)


def test_maps_of_different_sizes_are_refused(teachers):
    model = distiller_of("RetinaNet", teachers["ATSS"])
    step, other = Step(model), Step(model, [image_input(64, 64)])
    message = r"level 0 is of size \(12, 12\) in the student and \(8, 8\) in the teacher"
    with pytest.raises(UserError, match=message):
        with EventStorage():
            step.setting(step.student, other.teacher)
