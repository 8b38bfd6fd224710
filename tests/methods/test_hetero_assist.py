"""HEAD on RoIs: its terms, whom they teach, what it refuses, and that nothing of it stays in the student."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill import distiller  # noqa: F401  registers the meta-architecture
from d2_distill.detectors.building import plain_config
from d2_distill.engine.trainer import build_checkpointer
from d2_distill.errors import UserError
from d2_distill.methods.assist_dense import SameLevels
from d2_distill.methods.assist_rois import SharedRoIs, TracedRoIs

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, image_input, save_teacher

RCNN, CASCADE = "GeneralizedRCNN", "GeneralizedRCNN cascade"
TRACED = [("RetinaNet", RCNN), ("OpenMMLabFCOS", CASCADE), ("GFLv2", RCNN), ("FCOS", RCNN), ("TOOD", RCNN)]
SHARED = [(RCNN, RCNN), (RCNN, CASCADE)]
TERMS = {"loss_assist", "loss_akd", "loss_ckd"}
FEW = {"RPN__PRE_NMS_TOPK_TRAIN": 50, "RPN__POST_NMS_TOPK_TRAIN": 20}
ASSIST_ONLY = {"DISTILL__HEAD__AKD_WEIGHT": 0.0, "DISTILL__HEAD__CKD_WEIGHT": 0.0}
# What describes the assistant where there is no teacher.
DESCRIPTION = {
    "ROI_HEADS__NAME": "StandardROIHeads",
    "ROI_HEADS__BATCH_SIZE_PER_IMAGE": 8,
    "ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD__NUM_FC": 2,
    "ROI_BOX_HEAD__FC_DIM": 16,
    "ROI_BOX_HEAD__POOLER_RESOLUTION": 7,
    "DISTILL__HEAD__ASSISTANT_INIT": "fresh",
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in (RCNN, CASCADE, "ATSS")}


@pytest.fixture
def make(teachers):
    """Builds a distilled student of a case, taught by HEAD; overrides as for `distiller_cfg`."""

    def make(case: str, teacher_case, **overrides):
        torch.manual_seed(0)
        teacher = teachers[teacher_case] if teacher_case else None
        return build_model(distiller_cfg(case, teacher, ["HEAD"], **{**FEW, **overrides})).prepare_training().train()

    return make


def head_of(model):
    return model.methods["HEAD"]


def step(model, inputs, iteration: int = 2000):
    """Losses of a training step and what was recorded."""
    torch.manual_seed(5)
    with EventStorage(iteration) as storage:
        return model(inputs), {name: value for name, (value, _) in storage.latest().items()}


def learners(model, *losses):
    """Names of the trainable parameters that a gradient other than zero reaches."""
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def below(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


@pytest.mark.parametrize("case, teacher_case", TRACED + SHARED)
def test_every_term_and_whom_it_teaches(make, case, teacher_case):
    model = make(case, teacher_case)
    setting = head_of(model).setting
    assert type(setting) is (SharedRoIs if case == RCNN else TracedRoIs)
    before = model.teacher.fingerprint()
    losses, recorded = step(model, batch())
    assert TERMS < set(losses) and all(losses[term] > 0 and losses[term].isfinite() for term in TERMS)
    parts = [value for name, value in recorded.items() if name.startswith("assist/loss_")]
    assert len(parts) == 2 * setting.assistant.staged.num_stages
    assert sum(parts) == pytest.approx(losses["loss_assist"].item(), rel=1e-5)

    sum(losses.values()).backward(retain_graph=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before

    names = {name for name, _ in model.named_parameters()}
    own = "methods.HEAD.setting"
    assistant, akd, cross = (below(names, f"{own}.{part}.") for part in ("assistant", "akd", "cross"))
    assert names == below(names, "student.") | assistant | akd | cross
    # Of the student, the assistant and its imitation teach the backbone alone.
    found = learners(model, losses["loss_assist"])
    assert not found & (akd | cross) and found & assistant >= below(names, f"{own}.assistant.roi_heads.box_head")
    assert below(found, "student.") and below(found, "student.") == below(found, "student.backbone.")
    found = learners(model, losses["loss_akd"])
    assert akd <= found and not found & cross and not below(found, f"{own}.assistant.roi_heads.box_predictor")
    assert below(found, "student.") and below(found, "student.") == below(found, "student.backbone.")
    # CKD teaches the part of the student's head that imitates.
    found = learners(model, losses["loss_ckd"])
    assert cross <= found and not found & (assistant | akd)
    head = {RCNN: "student.roi_heads.box_head.", "TOOD": "student.head.subnet."}.get(case, "student.head.cls_subnet.")
    assert below(found, head) and found == below(found, "student.backbone.", head) | cross


def test_traced_terms_in_slow_form(make):
    """RetinaNet: each RoI of the sample on its own, in double precision."""
    model = make("RetinaNet", RCNN, DISTILL__HEAD__CKD_TAP=1)
    setting = head_of(model).setting
    calls = []
    setting.assistant.register_forward_hook(lambda _, arguments, result: calls.append((arguments, result)))
    losses, _ = step(model, batch())
    features, sampled, gt_instances = calls[0][0]
    vectors = calls[0][1].stages[0].outputs.vectors
    student = model.staged.run(model.staged.preprocess(batch()), gt_instances, taps=head_of(model).taps())
    teacher = model.teacher.staged.run(student.images, frozen=True)
    heads, tower = model.teacher.model.roi_heads, model.student.head.cls_subnet
    akd, ckd, row = [[], []], [], 0
    for image, rois in enumerate(sampled):
        for box, (level, y, x, _) in zip(rois.proposal_boxes, rois.positions.tolist()):
            boxes = [rois.proposal_boxes[:0] for _ in sampled]
            boxes[image] = type(rois.proposal_boxes)(box[None])
            pooled = heads.box_pooler([teacher.features[name] for name in heads.box_in_features], boxes)
            first = heads.box_head.fc1(pooled.flatten(1)).relu()
            targets = [first[0], heads.box_head.fc2(first).relu()[0]]
            for layer, target in enumerate(targets):
                ours = setting.akd[0][layer](vectors[layer][row])
                akd[layer].append((ours.double() - target.double()).square().mean())
            if level >= 0:
                feature = tower[:2](student.features[f"p{level + 3}"])[image, :, y, x]
                ours = setting.cross.linear(feature[None], torch.zeros(1, dtype=torch.int64))[0]
                ckd.append((ours.double() - targets[1].double()).square().mean())
            row += 1
    assert 0 < len(ckd) < row == len(vectors[0])
    expected = sum(torch.stack(layer).mean() for layer in akd)
    # The weights are 2.0, and the warm-up has ended.
    torch.testing.assert_close(losses["loss_akd"], 2 * expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss_ckd"], 2 * torch.stack(ckd).mean().float(), rtol=1e-4, atol=0)


def test_shared_regions_are_the_students_own(make):
    """One sample: the student's losses, the assistant and the teacher are on the same proposals."""
    model = make(RCNN, CASCADE)
    runs, setting = [], head_of(model).setting
    setting.register_forward_hook(lambda _, arguments, result: runs.append((*arguments, result)))
    step(model, batch())
    [(student, teacher, assistance)] = runs
    assert len(assistance.akd) == 6 and len(assistance.ckd) == 1
    adapted, target = assistance.ckd[0]
    boxes = [image.proposal_boxes for image in student.sampled_proposals]
    assert len(adapted) == len(target) == sum(map(len, boxes)) > 0
    own = model.staged.roi_heads.stage(0, student.features, boxes).vectors[-1]
    torch.testing.assert_close(adapted, own @ setting.cross.weight.T)
    first = model.teacher.model.roi_heads
    pooled = first.box_pooler([teacher.features[name] for name in first.box_in_features], boxes)
    torch.testing.assert_close(target, first.box_head[0](pooled))
    # AKD's first two pairs are on the same rows, the next ones on boxes that the assistant refined.
    assert torch.equal(assistance.akd[1][1], target) and not torch.equal(assistance.akd[3][1], target)


@pytest.mark.parametrize("per_anchor", [False, True])
def test_layers_for_each_anchor(make, per_anchor):
    linear = head_of(make("RetinaNet", RCNN, DISTILL__HEAD__PER_ANCHOR=per_anchor)).setting.cross.linear
    assert linear.weight.shape == (32 * (6 if per_anchor else 1), 32)


@pytest.mark.parametrize("case, teacher_case", [TRACED[0], TRACED[1], SHARED[1]])
def test_images_without_objects(make, case, teacher_case):
    model = make(case, teacher_case)
    losses, _ = step(model, [image_input(64, 96), image_input(96, 64, seed=1)])
    assert TERMS < set(losses) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case, teacher_case", [TRACED[0], TRACED[1], SHARED[1]])
@pytest.mark.parametrize("objects", [True, False])
def test_no_proposals(make, case, teacher_case, objects):
    """Ground truth alone is left, which CKD of a one-stage student leaves out; or nothing at all."""
    model = make(case, teacher_case, RPN__POST_NMS_TOPK_TRAIN=0)
    losses, _ = step(model, batch() if objects else [image_input(64, 96), image_input(96, 64, seed=1)])
    for term in TERMS:
        assert bool(losses[term] > 0) == (objects and not (term == "loss_ckd" and case != RCNN)), term
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case, teacher_case", [TRACED[0], SHARED[1]])
def test_assistant_starts_as_the_teachers_head(make, case, teacher_case):
    model = make(case, teacher_case)
    ours = head_of(model).setting.assistant.roi_heads.state_dict()
    theirs = model.teacher.model.roi_heads.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    fresh = make(case, teacher_case, DISTILL__HEAD__ASSISTANT_INIT="fresh")
    weight = "box_head.fc1.weight" if teacher_case == RCNN else "box_head.0.fc1.weight"
    assert not torch.equal(head_of(fresh).setting.assistant.roi_heads.state_dict()[weight], ours[weight])
    # Neither shifts the random numbers of the student.
    plain = build(detector_cfg(case, **FEW)).state_dict()
    for built in (model, fresh):
        assert all(torch.equal(value, plain[name]) for name, value in built.student.state_dict().items())


def test_features_that_the_assistant_reads(make):
    """By default as many as the teacher's head; of a two-stage student, those of the same strides."""
    assert head_of(make("RetinaNet", RCNN)).setting.assistant.roi_heads.box_in_features == ["p3", "p4", "p5"]
    assert head_of(make(RCNN, RCNN)).setting.assistant.roi_heads.box_in_features == ["p2", "p3", "p4", "p5"]
    named = make("RetinaNet", RCNN, DISTILL__HEAD__IN_FEATURES=("p4", "p5"))
    assert head_of(named).setting.assistant.roi_heads.box_in_features == ["p4", "p5"]
    losses, _ = step(named, batch())
    assert losses["loss_akd"] > 0


@pytest.mark.parametrize("case", ["RetinaNet", RCNN])
def test_assist_only_needs_no_teacher(make, case):
    description = {key: value for key, value in DESCRIPTION.items() if case != RCNN or "DISTILL" in key}
    model = make(case, None, **description, **ASSIST_ONLY)
    assert model.teacher is None and not list(head_of(model).setting.akd.parameters())
    losses, recorded = step(model, batch())
    assert TERMS & set(losses) == {"loss_assist"} and recorded["assist/loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case, teacher_case", [TRACED[0], SHARED[0]])
@pytest.mark.parametrize("off, parts", [("AKD", {"assistant", "cross"}), ("CKD", {"assistant", "akd"})])
def test_a_weight_of_zero_leaves_a_part_out(make, case, teacher_case, off, parts):
    model = make(case, teacher_case, **{f"DISTILL__HEAD__{off}_WEIGHT": 0.0})
    assert {name.split(".")[1] for name in head_of(model).state_dict()} == parts
    losses, _ = step(model, batch())
    assert TERMS - set(losses) == {f"loss_{off.lower()}"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_each_term_has_its_schedule(make):
    schedules = {
        "DISTILL__HEAD__ASSIST_SCHEDULE": [["Decay", 20]],
        "DISTILL__HEAD__AKD_SCHEDULE": [["Warmup", 10]],
        "DISTILL__HEAD__CKD_SCHEDULE": [["EarlyStop", 4]],
    }
    model = make("RetinaNet", RCNN, **schedules)
    at = {iteration: step(model, batch(), iteration)[0] for iteration in (0, 5, 10)}
    found = {term: torch.stack([losses[term] for losses in at.values()]) for term in TERMS}
    full = {"loss_assist": found["loss_assist"][0], "loss_akd": found["loss_akd"][2], "loss_ckd": found["loss_ckd"][0]}
    expected = {"loss_assist": [1, 0.75, 0.5], "loss_akd": [0, 0.5, 1], "loss_ckd": [1, 0, 0]}
    for term, factors in expected.items():
        torch.testing.assert_close(found[term] / full[term], torch.tensor(factors, dtype=torch.float32))


def train(model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for number in steps:
        losses, _ = step(model, batch(seed=number), iteration=number)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def calls_of(model, inputs):
    """Names of the modules that an inference calls, in order, and its detections."""
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        detections = model(inputs)
    for hook in hooks:
        hook.remove()
    return calls, detections


@pytest.mark.parametrize("case, teacher_case", [TRACED[0], SHARED[1]])
def test_nothing_of_it_stays_in_the_trained_student(make, case, teacher_case, tmp_path):
    """The checkpoint is the plain student's: same parameters, and at inference the same modules in the same order."""
    model = make(case, teacher_case)
    plain = build_model(plain_config(distiller_cfg(case, None))).eval()
    before, untrained = calls_of(plain, batch())
    train(model, range(1, 3))
    build_checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    shapes = [(name, value.shape) for name, value in plain.state_dict().items()]
    assert [(name, value.shape) for name, value in saved["model"].items()] == shapes
    assert {name.split(".")[2] for name in saved["distill"]} == {"assistant", "akd", "cross"}

    plain.load_state_dict(saved["model"], strict=True)
    calls, detections = calls_of(plain, batch())
    assert calls == before
    distilled_calls, ours = calls_of(model.eval(), batch())
    assert distilled_calls == [*(f"student.{name}".rstrip(".") for name in before), ""]
    for mine, other, old in zip(ours, detections, untrained):
        assert torch.equal(mine["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)
        assert torch.equal(mine["instances"].scores, other["instances"].scores)
        assert not torch.equal(old["instances"].scores, other["instances"].scores)


def test_a_restored_checkpoint_goes_on_exactly(make, tmp_path):
    """Assistant and adapters are saved beside the student."""
    model = make("OpenMMLabRetinaNet", CASCADE)
    train(model, range(1, 3))
    build_checkpointer(model, str(tmp_path)).save("model")
    expected = train(model, [3])
    other = make("OpenMMLabRetinaNet", CASCADE, DISTILL__HEAD__ASSISTANT_INIT="fresh")
    build_checkpointer(other, str(tmp_path)).load(str(tmp_path / "model.pth"))
    assert train(other, [3]) == expected


def test_one_stage_pairs_are_compared_level_by_level(make):
    assert type(head_of(make("RetinaNet", "ATSS")).setting) is SameLevels


@pytest.mark.parametrize(
    "case, teacher_case, overrides, message",
    [
        (RCNN, "ATSS", {}, "student GeneralizedRCNN with the teacher ATSS: a two-stage student needs a two-stage"),
        (CASCADE, CASCADE, {}, "RoI heads of the student GeneralizedRCNN CascadeROIHeads: .* StandardROIHeads .*MODEL.ROI_HEADS.NAME"),
        ("RetinaNet", None, {}, "HEAD with AKD_WEIGHT, .* needs a teacher; set MODEL.DISTILL.TEACHER.CONFIG_FILE"),
        ("RetinaNet", None, ASSIST_ONLY, "ASSISTANT_INIT 'teacher' needs a teacher"),
        (
            "RetinaNet", None,
            {**ASSIST_ONLY, "DISTILL__HEAD__ASSISTANT_INIT": "fresh", "ROI_HEADS__NAME": "CascadeROIHeads"},
            "MODEL.ROI_BOX_HEAD has NAME '' and NUM_FC 0 in the student's config",
        ),
        ("RetinaNet", RCNN, {"DISTILL__HEAD__ASSIST_WEIGHT": 0.0}, "ASSIST_WEIGHT is 0, but AKD_WEIGHT is 2.0"),
        ("RetinaNet", RCNN, {"DISTILL__HEAD__ASSISTANT_INIT": "copy"}, "ASSISTANT_INIT is 'copy'; choose 'teacher' or"),
        ("RetinaNet", RCNN, {"DISTILL__HEAD__IN_FEATURES": ("p2",)}, "HEAD.IN_FEATURES has 'p2', which the student"),
        ("RetinaNet", RCNN, {"DISTILL__HEAD__CKD_TAP": 3}, "CKD_TAP is 3; .* has 2 blocks, so it must lie between 0"),
        ("RetinaNet", RCNN, {"DISTILL__HEAD__CKD_TAP": -2}, "CKD_TAP is -2"),
        ("RetinaNet", RCNN, {"RETINANET__NUM_CLASSES": 5}, "student has 5 classes and the teacher 3"),
        ("RetinaNet", RCNN, {"FPN__OUT_CHANNELS": 16}, "fc1.weight is .*FPN.OUT_CHANNELS, or set .*ASSISTANT_INIT"),
        (
            RCNN, RCNN,
            {
                "FPN__IN_FEATURES": ["res3", "res4", "res5"], "RPN__IN_FEATURES": ["p3", "p4", "p5"],
                "ROI_HEADS__IN_FEATURES": ["p3", "p4", "p5"], "ANCHOR_GENERATOR__SIZES": [[32], [64], [96]],
            },
            r"reads the strides of the teacher's RoI head, \[4, 8, 16, 32\], but the student has \[8, 16, 32\] only",
        ),
    ],
)
def test_what_it_refuses(make, case, teacher_case, overrides, message):
    with pytest.raises(UserError, match=message):
        make(case, teacher_case, **overrides)


def test_teacher_of_other_channels_and_classes(make):
    """A fresh assistant needs neither the teacher's channels nor its classes."""
    overrides = {"FPN__OUT_CHANNELS": 16, "RETINANET__NUM_CLASSES": 5, "DISTILL__HEAD__ASSISTANT_INIT": "fresh"}
    model = make("RetinaNet", RCNN, **overrides)
    assert head_of(model).setting.assistant.roi_heads.num_classes == 5
    losses, _ = step(model, batch())
    assert all(losses[term] > 0 for term in TERMS)
