"""The published MSAD code's resolutions, fusion and distillation term, and whole steps on a toy backbone."""

from __future__ import annotations

import re
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.backbones.low_resolution import decimate
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.building import build_detector
from d2_distill.detectors.multi_scale import BRANCHES
from d2_distill.distiller import Distiller
from d2_distill.layers.fusion import ScaleFusion
from d2_distill.methods import MSAD, build_methods
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_close, assert_close_gradient, assert_recorded, assert_recorded_gradient
from ..openmmlab import set_keys
from .msad_head import maps_of
from .msad_toys import STATISTICS, STUDENT, TEACHER, Toys, images_of, in_our_names, load, published_names

# Our losses by their published names.
LOSSES = {"loss_fcos_cls": "loss_cls", "loss_fcos_loc": "loss_box_reg", "loss_fcos_ctr": "loss_centerness"}
INHERIT = ("backbone.pyramid=detector.backbone", "head=detector.head")


def assert_state(case: Case, model: nn.Module, prefixes: dict[str, str]) -> None:
    """Gradients, where recorded, and running statistics after the step."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, expected in in_our_names(case, "grad", prefixes).items():
        assert_close_gradient(case, name, parameters[name].grad, expected)
    statistics = {key: x for key, x in in_our_names(case, "after", prefixes).items() if key in buffers}
    assert statistics
    for name, expected in statistics.items():
        assert_close(case, name, buffers[name], expected)


def check_preprocess(case: Case) -> None:
    """Ground truth and sizes of ours stay those of the whole images."""
    cfg = get_distill_cfg()
    set_keys(cfg, {
        "META_ARCHITECTURE": "OpenMMLabFCOS",
        "BACKBONE.NAME": "toy_low_resolution_pyramid",
        "DEVICE": "cpu",
        "PIXEL_MEAN": list(case.data["PIXEL_MEAN"]),
        "PIXEL_STD": list(case.data["PIXEL_STD"]),
        "FCOS.IN_FEATURES": ["p5", "p6", "p7"],
        "FCOS.SIZES_OF_INTEREST": [128, 256],
        "FCOS.NUM_CONVS": 0,
    })
    toy = {"CHANNELS": 1, "EPS": 1e-5, "MOMENTUM": 0.1}
    cfg.MODEL.TOY = CfgNode({"LEVELS": [4, 5, 6], **toy})
    student = build_detector(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "MultiScaleDetector", "toy_pyramid"
    cfg.MODEL.MSAD.FUSION_REDUCTION = 1
    cfg.MODEL.TOY = CfgNode({"LEVELS": [4, 5, 6, 7], **toy})
    teacher = build_detector(cfg)
    inputs, factor = images_of(case), student.backbone.factor
    images = teacher.preprocess_image(inputs)
    assert [list(size) for size in images.image_sizes] == case.data["hr_image_sizes"]
    assert [[side // factor for side in size] for size in images.image_sizes] == case.data["lr_image_sizes"]
    assert_recorded(case, "hr", images.tensor)
    assert_recorded(case, "lr", decimate(images.tensor, factor))
    assert torch.equal(student.preprocess_image(inputs).tensor, images.tensor)
    for index in range(sum(key.startswith("hr_gt_boxes_") for key in case.arrays)):
        assert_recorded(case, f"lr_gt_boxes_{index}", case.tensor(f"hr_gt_boxes_{index}") / factor)


def check_fusion(case: Case) -> None:
    params = case.data["params"]
    for ending in ("", "_first_image"):
        fusion = ScaleFusion(
            params["in_channel"] // 2, reduction=params["reduction"], first_image=ending == "_first_image"
        )
        fusion.load_state_dict({f"fc.{k}.weight": case.tensor(f"fc{k}_weight").float() for k in (0, 2)})
        for level in range(sum(key.startswith("hr_") for key in case.arrays)):
            high, low = case.tensor(f"hr_{level}"), case.tensor(f"lr_{level}")
            assert (len(high), 2 * high.shape[1]) == (params["batch"], params["in_channel"])
            with torch.no_grad():
                assert_recorded(case, f"score_{level}", fusion.scores(high, low)[:, :, None, None])
                assert_recorded(case, f"fused{ending}_{level}", fusion(high, low))


def check_kd(case: Case) -> None:
    params = case.data["params"]
    ours, theirs = ([x.requires_grad_() for x in maps_of(case, role)] for role in ("student", "teacher"))
    names = [f"p{level}" for level in range(len(ours))]
    channels = ours[0].shape[1]
    method = MSAD(
        pairs=[FeaturePair(name, name, channels, channels) for name in names],
        weights={"loss_msad": params["KD_ALPHA"] * params["KD_TEMPERATURE"]},
        schedule=build_schedule([["Warmup", params["warmup"]]]),
    )
    with EventStorage() as storage:
        runs = [SimpleNamespace(features=dict(zip(names, maps))) for maps in (ours, theirs)]
        loss = method(*runs)["loss_msad"]
        assert storage.latest()["msad/raw"][0] == loss.item()
    counts = case.tensor("counts").tolist()
    assert_recorded(case, "loss", [loss.item() * method.weight_at("loss_msad", count) for count in counts])
    gradients = [re.fullmatch(r"grad_count(\d+)_(\d+)", key) for key in case.arrays if key.startswith("grad_")]
    assert len(gradients) == len(ours)
    for match in gradients:
        weighted = loss * method.weight_at("loss_msad", int(match[1]))
        (gradient,) = torch.autograd.grad(weighted, ours[int(match[2])], retain_graph=True)
        assert_recorded_gradient(case, match[0], gradient)


def check_teacher_step(case: Case) -> None:
    toys = Toys(case)
    model, inputs = toys.teacher().train(), toys.inputs()
    assert model.head_in_features == list(case.data["params"]["H_IN_FEATURES"])
    run = stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])
    with EventStorage():
        losses = run.losses
    for level, feature in enumerate(run.features.values()):
        if f"fr_feat_{level}" in case.arrays:
            assert_recorded(case, f"fr_feat_{level}", feature)
    names = {
        f"{theirs}_{ending}": f"{ours}_{ending}" for theirs, ours in LOSSES.items() for ending in BRANCHES.values()
    }
    assert set(names.values()) == set(losses) and set(names) == set(case.data["losses"])
    for theirs, ours in names.items():
        assert_recorded(case, f"loss.{theirs}", losses[ours])
        assert case.data["losses"][theirs] == case.tensor(f"loss.{theirs}")
    assert_recorded(case, "loss.total", sum(losses.values()))
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == case.data["params_without_grad"]
    assert_state(case, model, TEACHER)


def check_student_step(case: Case) -> None:
    """The teacher's batch norms use and update batch statistics in the reference."""
    toys = Toys(case)
    inputs = toys.inputs()
    inherited = INHERIT if case.data["student_equals_teacher_at_start"] else ()
    counts = list(case.data["counts"])
    assert list(case.data["losses_by_count"]) == list(map(str, counts))
    for index, count in enumerate(counts):
        student, teacher_model = toys.student(), toys.teacher()
        if not inherited:
            load(student, case, STUDENT)
        teacher = Teacher(teacher_model, input_format="BGR", batch_statistics=True)
        methods = build_methods(toys.cfg, stage_detector(student), teacher)
        model = Distiller(
            student=student, teacher=teacher, methods=methods, input_format="BGR", inherited=inherited
        ).train()
        with EventStorage(count):
            losses = model(inputs)
        ours = {**{f"{theirs}_st": losses[name] for theirs, name in LOSSES.items()}, "loss_kd": losses["loss_msad"]}
        assert set(ours) == set(case.data["losses_by_count"][str(count)])
        for theirs, value in ours.items():
            assert_recorded(case, f"loss{index}.{theirs}", value)
            assert case.data["losses_by_count"][str(count)][theirs] == case.tensor(f"loss{index}.{theirs}")
    sum(losses.values()).backward()
    assert_state(case, student, STUDENT)
    assert_state(case, teacher_model, TEACHER)
    assert_trained(case, toys, student, teacher_model)
    assert_unused_levels(case, toys, student.preprocess_image(inputs).tensor)


def assert_trained(case: Case, toys: Toys, student: nn.Module, teacher: nn.Module) -> None:
    """The teacher is frozen, and the student has a gradient of all but the levels that ours does not have."""
    frozen = [*published_names(case, "T_"), *published_names(case, "SE.")]
    assert sorted(case.data["frozen_parameters"]) == sorted(frozen)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    names = [f"S{name[1:]}" for name in published_names(case, "T_")]
    assert sorted(case.data["trainable_without_grad"]) == sorted(name for name in names if toys.is_unused(name))
    assert len(names) == len(list(student.parameters())) + len(case.data["trainable_without_grad"])


def assert_unused_levels(case: Case, toys: Toys, images: torch.Tensor) -> None:
    """Their statistics move in the reference, which computes them, without any effect."""
    group = "S_backbone." if any(key.startswith("w.S_backbone.") for key in case.arrays) else "T_backbone."
    levels = toys.unused().train()
    state = {name: case.tensor(f"w.{group}{name}").float() for name in levels.state_dict() if "tracked" not in name}
    levels.load_state_dict(state, strict=False)
    levels(decimate(images, toys.cfg.MODEL.LOW_RESOLUTION.FACTOR))
    for name, buffer in levels.named_buffers():
        if name.endswith(STATISTICS):
            assert_recorded(case, f"after.S_backbone.{name}", buffer)


def check_inference(case: Case, toys: Toys, model: nn.Module) -> None:
    height, width = case.data["output_height_width"]
    inputs = [{**each, "height": height, "width": width} for each in toys.inputs()]
    with torch.no_grad():
        [found] = model.eval()(inputs)
    found = found["instances"]
    assert len(found) == case.data["num"] and found.image_size == (height, width)
    assert_recorded(case, "boxes", found.pred_boxes.tensor)
    assert_recorded(case, "scores", found.scores)
    assert_recorded(case, "classes", found.pred_classes)


def check_teacher_inference(case: Case) -> None:
    toys = Toys(case)
    check_inference(case, toys, toys.teacher())


def check_student_inference(case: Case) -> None:
    toys = Toys(case)
    check_inference(case, toys, load(toys.student(), case, STUDENT))


CHECKS = {
    "preprocess": check_preprocess,
    "fusion": check_fusion,
    "kd": check_kd,
    "toy_teacher_step": check_teacher_step,
    "toy_student_step": check_student_step,
    "toy_teacher_inference": check_teacher_inference,
    "toy_student_inference": check_student_inference,
}
