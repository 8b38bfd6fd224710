"""TF-HEAD: what the assistants and the student learn from, and which parts a config selects."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.assistants.dense import tower_ends
from d2_distill.detectors.building import build_detector
from d2_distill.distiller import Distiller
from d2_distill.engine.hooks import LossNormalizers
from d2_distill.engine.trainer import build_checkpointer
from d2_distill.errors import UserError

from ..small_detectors import ONE_STAGE, batch, build, detector_cfg, distiller_cfg, image_input, save_teacher

# An R-CNN head small enough for tests.
ROI_KEYS = {
    "ROI_HEADS__NAME": "StandardROIHeads",
    "ROI_HEADS__BATCH_SIZE_PER_IMAGE": 16,
    "ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD__NUM_FC": 2,
    "ROI_BOX_HEAD__FC_DIM": 24,
    "ROI_BOX_HEAD__POOLER_RESOLUTION": 3,
    "RPN__PRE_NMS_TOPK_TRAIN": 50,
    "RPN__POST_NMS_TOPK_TRAIN": 20,
}
STUDENTS = {"RetinaNet": "OpenMMLabFCOS", "FCOS": "RetinaNet", "GFL": "ATSS"}  # and their dense assistants
DENSE = {"loss_assist_dense", "loss_cross_dense"}
RCNN = {"loss_assist_rcnn", "loss_cross_rcnn"}
WITHOUT_DENSE = {"DENSE_ASSISTANT": "", "CROSS_DENSE_WEIGHT": 0.0}
WITHOUT_RCNN = {"RCNN_WEIGHT": 0.0, "CROSS_RCNN_WEIGHT": 0.0}
NO_BOXES = [image_input(64, 96), image_input(96, 64, seed=1)]


def cfg_of(case: str = "RetinaNet", *, below=None, teacher=None, **options):
    """Config with options of TF_HEAD, and others below MODEL."""
    keys = {f"DISTILL__TF_HEAD__{key}": value for key, value in options.items()}
    return distiller_cfg(case, teacher, ["TFHEAD"], **{**ROI_KEYS, **(below or {}), **keys})


def distiller_of(case: str = "RetinaNet", **options) -> Distiller:
    torch.manual_seed(0)
    return build_model(cfg_of(case, **options)).prepare_training().train()


class Step:
    """A training step of the method, with what the parts made of it."""

    def __init__(self, model: Distiller, inputs=None) -> None:
        inputs = batch() if inputs is None else inputs
        self.method, self.seen = model.methods["TFHEAD"], {}
        for name in ("dense", "rcnn"):
            part = getattr(self.method, name)
            if part is not None:
                part.register_forward_hook(
                    lambda _, given, made, name=name: self.seen.update({name: (given, made)})
                )
        gt_instances = [x["instances"] for x in inputs]
        self.student = model.staged.run(model.staged.preprocess(inputs), gt_instances)
        torch.manual_seed(5)
        with EventStorage(7) as self.storage:
            self.own = self.student.losses
            self.terms = self.method(self.student, None)


def gradients(total, wanted):
    return torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True)


BATCHES = {
    "boxes": batch(),
    "an image without boxes": [*batch()[:1], *NO_BOXES[:1]],
    "no boxes": NO_BOXES,
    "a box of one pixel": [image_input(96, 96, [[40, 40, 41, 41]], [1])],
}
# Student, options, terms.
SELECTIONS = [
    *[(case, {"DENSE_ASSISTANT": assistant}, DENSE | RCNN) for case, assistant in STUDENTS.items()],
    ("RetinaNet", {"DENSE_ASSISTANT": "TOOD"}, DENSE | RCNN),
    ("RetinaNet", WITHOUT_DENSE, RCNN),
    ("RetinaNet", WITHOUT_RCNN, DENSE),
    ("RetinaNet", {"PER_ANCHOR": False}, DENSE | RCNN),
    ("RetinaNet", {"CROSS_DENSE_WEIGHT": 0.0}, RCNN | {"loss_assist_dense"}),
    ("RetinaNet", {"CROSS_RCNN_WEIGHT": 0.0}, DENSE | {"loss_assist_rcnn"}),
]


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("case, options, terms", SELECTIONS)
def test_every_parameter_learns(case, options, terms, inputs):
    model = distiller_of(case, **options)
    with EventStorage(1):
        losses = model(BATCHES[inputs])
    sum(losses.values()).backward()
    assert {name for name in losses if "assist" in name or "cross" in name} == terms
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    adapters = [p for name, p in model.methods.named_parameters() if ".cross_" in name]
    assert adapters and all(p.grad.any() for p in adapters)


@pytest.mark.parametrize("case", ONE_STAGE)
def test_every_one_stage_student(case):
    step = Step(distiller_of(case))
    assert set(step.terms) == DENSE | RCNN
    for term, value in step.terms.items():
        found = gradients(value, step.student.features.values())
        assert value > 0 and value.isfinite() and any(x is not None and x.any() for x in found), term


def slow_dense(step: Step) -> torch.Tensor:
    weight, bias = step.method.cross_dense.weight[:, :, 0, 0].double(), step.method.cross_dense.bias.double()
    _, run = step.seen["dense"]
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(tower_ends(step.student, "cls"), tower_ends(run, "cls")):
        errors = []
        for image in range(len(ours)):
            for y in range(ours.shape[2]):
                for x in range(ours.shape[3]):
                    adapted = weight @ ours[image, :, y, x].double() + bias
                    errors.append((adapted - theirs[image, :, y, x].detach().double()).square())
        total = total + torch.stack(errors).mean()
    return total


def slow_rcnn(step: Step, per_anchor: bool) -> torch.Tensor:
    layer = step.method.cross_rcnn.linear
    (_, sampled, _), assistance = step.seen["rcnn"]
    targets = iter(assistance.stages[0].outputs.vectors[-1].detach().double())
    errors = []
    for image, rois in enumerate(sampled):
        for level, y, x, anchor in rois.positions.tolist():
            target = next(targets)
            if level < 0:
                continue
            block = slice(anchor * 24, (anchor + 1) * 24) if per_anchor else slice(None)
            vector = tower_ends(step.student, "cls")[level][image, :, y, x].double()
            adapted = layer.weight[block].double() @ vector + layer.bias[block].double()
            errors.append((adapted - target).square())
    assert next(targets, None) is None and 0 < len(errors) < sum(map(len, sampled))
    return torch.stack(errors).mean()


@pytest.mark.parametrize("per_anchor", [True, False])
@pytest.mark.parametrize("case", STUDENTS)
def test_terms_are_sums_over_cells_and_rois(case, per_anchor):
    """Again, cell by cell and RoI by RoI in float64."""
    step = Step(distiller_of(case, DENSE_ASSISTANT=STUDENTS[case], PER_ANCHOR=per_anchor))
    anchors = step.student.staged.model.anchor_generator.num_anchors[0]
    rows = 24 * (anchors if per_anchor else 1)
    assert step.method.cross_rcnn.linear.weight.shape == (rows, 32) and (anchors > 1) == (case == "RetinaNet")
    expected = {
        "loss_cross_dense": slow_dense(step), "loss_cross_rcnn": slow_rcnn(step, per_anchor and anchors > 1)
    }
    wanted = [*step.student.features.values(), *step.method.cross_dense.parameters()]
    wanted += step.method.cross_rcnn.parameters()
    for term, value in expected.items():
        torch.testing.assert_close(step.terms[term].double(), value, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(gradients(step.terms[term], wanted), gradients(value, wanted)):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
            else:
                assert ours is None or not ours.any()
    assert torch.equal(step.terms["loss_assist_dense"], sum(step.seen["dense"][1].losses.values()))
    assert torch.equal(step.terms["loss_assist_rcnn"], sum(step.seen["rcnn"][1].losses.values()))


def test_imitation_does_not_reach_the_assistants():
    step = Step(distiller_of())
    assistants = [*step.method.dense.parameters(), *step.method.rcnn.parameters()]
    cross = step.terms["loss_cross_dense"] + step.terms["loss_cross_rcnn"]
    assert assistants and gradients(cross, assistants) == (None,) * len(assistants)
    # Nor the student's box tower, while all of its class tower learns.
    head = step.student.staged.model.head
    assert all(gradient.any() for gradient in gradients(cross, head.cls_subnet.parameters()))
    assert set(gradients(cross, [*head.bbox_subnet.parameters(), *head.cls_score.parameters()])) == {None}


def test_labels_reach_assistants_and_features_but_not_the_students_head():
    step = Step(distiller_of())
    head = list(step.student.staged.model.head.parameters())
    for part in ("dense", "rcnn"):
        term = step.terms[f"loss_assist_{part}"]
        assert gradients(term, head) == (None,) * len(head)
        found = gradients(term, [*getattr(step.method, part).parameters(), step.student.features["p3"]])
        assert all(gradient is not None for gradient in found) and found[-1].any()


def test_without_any_region_the_imitation_is_nothing():
    """No proposal is large enough, and there is no ground truth."""
    model = distiller_of(below={"PROPOSAL_GENERATOR__MIN_SIZE": 1000})
    step = Step(model, NO_BOXES)
    assert not any(map(len, step.seen["rcnn"][0][1])) and step.terms["loss_cross_rcnn"] == 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = sum(step.terms.values()) + sum(step.own.values())
    found = gradients(total, parameters)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)


def test_only_ground_truth_among_the_rois():
    step = Step(distiller_of(below={"PROPOSAL_GENERATOR__MIN_SIZE": 1000}))
    assert sum(map(len, step.seen["rcnn"][0][1])) == 3
    assert step.terms["loss_cross_rcnn"] == 0 and step.terms["loss_assist_rcnn"] > 0


def test_dense_assistant_of_fewer_levels():
    """The levels that it reads are compared, no others."""
    below = {"GFL__IN_FEATURES": ["p4", "p5"], **ROI_KEYS}
    step = Step(distiller_of(DENSE_ASSISTANT="GFL", below=below))
    ours, theirs = tower_ends(step.student, "cls"), tower_ends(step.seen["dense"][1], "cls")
    assert len(theirs) == 2
    expected = step.method.imitate_dense(ours[1:], theirs)
    assert torch.equal(step.terms["loss_cross_dense"], expected) and expected > 0
    found = gradients(expected, ours)
    assert found[0] is None and found[1].any() and found[2].any()


def test_a_cascade_assists_with_its_first_stage():
    below = {"ROI_HEADS__NAME": "CascadeROIHeads", "ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
    step = Step(distiller_of(below=below))
    assert len(step.seen["rcnn"][1].stages) == 3 and len(step.seen["rcnn"][1].losses) == 6
    found, expected = step.terms["loss_cross_rcnn"].double(), slow_rcnn(step, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_regions_are_read_from_the_features_of_the_config():
    assert distiller_of().methods["TFHEAD"].rcnn.roi_heads.box_in_features == ["p3", "p4", "p5"]
    model = distiller_of(IN_FEATURES=["p4", "p5"])
    assert model.methods["TFHEAD"].rcnn.roi_heads.box_in_features == ["p4", "p5"]


def test_weights_follow_their_schedules():
    options = {"ASSIST_SCHEDULE": [["Warmup", 4]], "CROSS_SCHEDULE": [["Warmup", 4], ["EarlyStop", 6]]}
    model = distiller_of(**options)
    assert not {"TFHEAD"} ^ set(model.methods)
    unweighted = Step(copy.deepcopy(model)).terms
    weights = {
        "loss_assist_dense": 0.5, "loss_assist_rcnn": 1.0, "loss_cross_dense": 1.0, "loss_cross_rcnn": 1.3
    }
    for iteration, warmup in ((0, 0.0), (1, 0.25), (4, 1.0), (6, 1.0), (7, 1.0)):
        torch.manual_seed(5)
        with EventStorage(iteration):
            losses = model(batch())
        for term, weight in weights.items():
            factor = warmup * (0.0 if "cross" in term and iteration > 6 else 1.0)
            torch.testing.assert_close(losses[term], unweighted[term] * weight * factor, rtol=1e-4, atol=1e-7)


def test_default_schedule_is_the_published_one_for_any_length():
    """Published for 90k iterations or about so many: a warm-up of 2000, and mimicry up to the first drop of the rate."""
    cfg = cfg_of()
    cfg.SOLVER.MAX_ITER = 1000
    method = build_model(cfg).prepare_training().methods["TFHEAD"]
    for term, weight, cross in (("loss_assist_rcnn", 1.0, False), ("loss_cross_rcnn", 1.3, True)):
        found = [method.weight_at(term, iteration) for iteration in (0, 10, 20, 650, 651)]
        assert found == pytest.approx([0, weight / 2, weight, weight, 0 if cross else weight])


def test_parts_of_the_losses_are_recorded_apart_from_the_students():
    step = Step(distiller_of(DENSE_ASSISTANT="OpenMMLabRetinaNet"))
    latest = {name: value for name, (value, _) in step.storage.latest().items()}
    for part in ("dense", "rcnn"):
        for name, loss in step.seen[part][1].losses.items():
            assert latest[f"assist_{part}/{name}"] == pytest.approx(loss.item())
    # Both count their positive anchors.
    assert {"num_pos_anchors", "assist_dense/num_pos_anchors"} <= set(latest)
    assert not any(name.startswith("roi_head/") for name in latest)


def test_the_student_is_trained_as_usual_beside_it():
    model = distiller_of()
    plain = build(detector_cfg("RetinaNet", **ROI_KEYS)).train()
    with EventStorage(3):
        expected, losses = plain(batch()), model(batch())
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert set(losses) == {*expected, *DENSE, *RCNN}


def test_running_normaliser_of_an_assistant_is_saved():
    """Stock RetinaNets divide by a moving average, which their state dict lacks."""
    model = distiller_of("GFL", DENSE_ASSISTANT="RetinaNet")
    with EventStorage():
        model(batch())
    hook = LossNormalizers(model, checkpoint_period=1)
    hook.gather()
    [values] = hook.state_dict()["values"]
    detector = model.methods["TFHEAD"].dense.detector
    assert values == {"methods.TFHEAD.dense.detector": detector.loss_normalizer}
    other = distiller_of("GFL", DENSE_ASSISTANT="RetinaNet")
    LossNormalizers(other, checkpoint_period=1).load_state_dict(hook.state_dict())
    assert other.methods["TFHEAD"].dense.detector.loss_normalizer == detector.loss_normalizer != 100


# What is saved, and what is left in evaluation.


def test_checkpoint_is_the_students(tmp_path):
    model = distiller_of()
    build_checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    plain = build(detector_cfg("RetinaNet", **ROI_KEYS))
    assert list(saved["model"]) == list(plain.state_dict())
    assert {name.split(".")[1] for name in saved["distill"]} == {"dense", "cross_dense", "rcnn", "cross_rcnn"}


def test_evaluation_builds_no_assistant():
    """A config whose assistants cannot even be built evaluates."""
    cfg = cfg_of(DENSE_ASSISTANT="Unknown", below={"ROI_HEADS__NAME": "Unknown"})
    with pytest.raises(UserError):
        build_model(cfg).prepare_training()
    student = build_detector(cfg).eval()
    assert list(student.state_dict()) == list(build(detector_cfg("RetinaNet")).state_dict())
    model = distiller_of().eval()
    model.methods["TFHEAD"].register_forward_hook(lambda *_: pytest.fail("an assistant ran"))
    plain = build(detector_cfg("RetinaNet", **ROI_KEYS)).eval()
    for ours, theirs in zip(model(batch()), plain(batch())):
        assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)


def test_weights_of_zero_leave_the_method_out():
    zeros = dict.fromkeys(("DENSE_WEIGHT", "RCNN_WEIGHT", "CROSS_DENSE_WEIGHT", "CROSS_RCNN_WEIGHT"), 0.0)
    model = distiller_of(**zeros)
    assert not model.methods and not list(model.methods.parameters())


# Refusals.


def test_two_stage_students_are_refused():
    with pytest.raises(UserError, match="TFHEAD cannot use the student GeneralizedRCNN; .*one-stage"):
        build_model(distiller_cfg("GeneralizedRCNN", None, ["TFHEAD"])).prepare_training()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"DENSE_ASSISTANT": ""}, "CROSS_DENSE_WEIGHT is 1.0, but .*DENSE_ASSISTANT or DENSE_WEIGHT says"),
        ({"DENSE_WEIGHT": 0.0}, "CROSS_DENSE_WEIGHT is 1.0, but .*set CROSS_DENSE_WEIGHT to 0 as well"),
        ({"RCNN_WEIGHT": 0.0}, "CROSS_RCNN_WEIGHT is 1.3, but there is no such .*TF_HEAD.RCNN_WEIGHT says"),
        ({**WITHOUT_DENSE, **WITHOUT_RCNN}, "TFHEAD has no assistant: name one in .*DENSE_ASSISTANT"),
        ({"DENSE_ASSISTANT": "Distiller"}, "TF_HEAD.DENSE_ASSISTANT is 'Distiller', which is no one-stage"),
        ({"IN_FEATURES": ["p2"]}, "TF_HEAD.IN_FEATURES has 'p2', which the student lacks"),
        ({"CROSS_SCHEDULE": [["Warm", 1]]}, r"TF_HEAD.CROSS_SCHEDULE\[0\] is .*'Warm'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        distiller_of(**options)


def test_assistants_that_the_config_does_not_describe(caplog):
    """Default levels and Detectron2's default RoI heads do not fit; the log says what takes their place."""
    undescribed = {"FCOS__IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"], "FCOS__SIZES_OF_INTEREST": [64, 128, 256, 512]}
    undescribed.update(ROI_HEADS__NAME="Res5ROIHeads", ROI_BOX_HEAD__NAME="", ROI_BOX_HEAD__NUM_FC=0)
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        method = distiller_of(below=undescribed).methods["TFHEAD"]
    assert method.dense.staged.in_features == ["p3", "p4", "p5"]
    assert len(method.rcnn.staged.fc_dims) == 2
    assert "gets MODEL.FCOS.IN_FEATURES ['p3', 'p4', 'p5'] and MODEL.FCOS.SIZES_OF_INTEREST [64, 128]" in caplog.text
    assert "it gets 2 fully connected layers" in caplog.text


def test_a_dense_assistant_of_levels_that_the_student_lacks_is_refused():
    with pytest.raises(UserError, match="MODEL.FCOS.IN_FEATURES has 'p6'"):
        distiller_of(below={"FCOS__IN_FEATURES": ["p4", "p6"], "FCOS__SIZES_OF_INTEREST": [32]})


def test_a_teacher_is_not_asked(tmp_path):
    """It may be there for other methods."""
    model = distiller_of(teacher=save_teacher(tmp_path, "GeneralizedRCNN"))
    model.teacher.model.backbone.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    with EventStorage(1):
        assert DENSE | RCNN <= set(model(batch()))
