"""The published MSAD code's resolutions, fusion and distillation term, and whole steps on a toy backbone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.apps.conversion.msad import head_names
from d2_distill.backbones.low_resolution import LowResolution, decimate
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.building import build_detector
from d2_distill.detectors.multi_scale import BRANCHES
from d2_distill.distiller import Distiller
from d2_distill.layers.fusion import ScaleFusion
from d2_distill.methods import MSAD
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_close, assert_close_gradient, assert_recorded, assert_recorded_gradient
from ..openmmlab import instances_of

WEIGHT, SCHEDULE = 0.6, [["Warmup", 500]]
# Our losses by their published names.
LOSSES = {"loss_fcos_cls": "loss_cls", "loss_fcos_loc": "loss_box_reg", "loss_fcos_ctr": "loss_centerness"}
# What a published state dict's prefixes are in ours.
TEACHER = {"T_backbone.": "detector.backbone.", "T_fcos_head.": "detector.head.", "SE.": "fusion."}
STUDENT = {"S_backbone.": "backbone.pyramid.", "S_fcos_head.": "head."}
INHERIT = ("backbone.pyramid=detector.backbone", "head=detector.head")


class ToyPyramid(Backbone):
    """The recordings' backbone: p_k = BatchNorm(Conv1x1(average over cells of 2^k pixels)), 256 channels."""

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.levels = levels
        for level in levels:
            self.add_module(f"conv{level}", nn.Conv2d(3, 256, 1))
            self.add_module(f"bn{level}", nn.BatchNorm2d(256))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in self.levels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        modules = dict(self.named_children())
        return {
            f"p{level}": modules[f"bn{level}"](modules[f"conv{level}"](F.avg_pool2d(x, 2**level)))
            for level in self.levels
        }


@BACKBONE_REGISTRY.register()
def toy_pyramid(cfg, input_shape: ShapeSpec) -> ToyPyramid:
    return ToyPyramid([4, 5, 6, 7])


@BACKBONE_REGISTRY.register()
def toy_low_resolution_pyramid(cfg, input_shape: ShapeSpec) -> LowResolution:
    """Without the level that is recorded as computed but not used."""
    return LowResolution(ToyPyramid([4, 5, 6]), factor=2)


def toy_cfg(detector: str, backbone: str, fusion_score: str = "per_image") -> CfgNode:
    """The recordings' parameters, which all toy cases share."""
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = detector, backbone, "cpu"
    cfg.MODEL.MSAD.FUSION_SCORE = fusion_score
    fcos = {
        "NUM_CLASSES": 3, "IN_FEATURES": ["p5", "p6", "p7"], "NUM_CONVS": 0, "SIZES_OF_INTEREST": [128, 256],
        "IOU_OFFSET": 1.0, "TOWER_BIAS": True, "PREDICTOR_BIAS": False, "INFERENCE": "adelaidet",
        "SCORE_THRESH_TEST": 0.05,
    }
    cfg.merge_from_list([item for key, value in fcos.items() for item in (f"MODEL.FCOS.{key}", value)])
    return cfg


def build_teacher(fusion_score: str = "per_image") -> nn.Module:
    return build_detector(toy_cfg("MultiScaleDetector", "toy_pyramid", fusion_score))


def build_low_resolution_student() -> nn.Module:
    return build_detector(toy_cfg("OpenMMLabFCOS", "toy_low_resolution_pyramid"))


def in_our_names(case: Case, group: str, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The recorded tensors ``<group>.<published name>`` of a model, by our names."""
    found = {}
    for published, ours in prefixes.items():
        start = f"{group}.{published}"
        keys = [key for key in case.arrays if key.startswith(start)]
        tensors = {key[len(start) :]: case.tensor(key).float() for key in keys}
        found.update({f"{ours}{name}": value for name, value in head_names(tensors).items()})
    return found


def load(model: nn.Module, case: Case, prefixes: dict[str, str]) -> nn.Module:
    """All recorded weights but those of a level that the student does not have."""
    state = in_our_names(case, "w", prefixes)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {name.split(".")[-1] for name in missing} <= {"num_batches_tracked"}
    assert {name.split(".")[-2] for name in unexpected} <= {"conv7", "bn7"} and len(state) > len(unexpected)
    return model


def inputs_of(case: Case) -> list[dict[str, Any]]:
    inputs = []
    for index in range(sum(key.startswith("image_") for key in case.arrays)):
        image = case.tensor(f"image_{index}")
        inputs.append({"image": image})
        if f"gt_boxes_{index}" in case.arrays:
            boxes, classes = case.tensor(f"gt_boxes_{index}"), case.tensor(f"gt_classes_{index}").long()
            inputs[-1]["instances"] = instances_of(image.shape[-2:], boxes, classes)
    return inputs


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
    inputs = [{"image": case.tensor(f"image_{index}")} for index in range(2)]
    teacher, student = build_teacher(), build_low_resolution_student()
    images = teacher.preprocess_image(inputs)
    assert [list(size) for size in images.image_sizes] == case.data["hr_image_sizes"]
    assert_recorded(case, "hr", images.tensor)
    assert_recorded(case, "lr", decimate(images.tensor, 2))
    assert torch.equal(student.preprocess_image(inputs).tensor, images.tensor)


def check_fusion(case: Case) -> None:
    params = case.data["params"]
    for ending in ("", "_first_image"):
        fusion = ScaleFusion(
            params["in_channel"] // 2, reduction=params["reduction"], first_image=ending == "_first_image"
        )
        fusion.load_state_dict({f"fc.{k}.weight": case.tensor(f"fc{k}_weight").float() for k in (0, 2)})
        for level in range(sum(key.startswith("hr_") for key in case.arrays)):
            high, low = case.tensor(f"hr_{level}"), case.tensor(f"lr_{level}")
            with torch.no_grad():
                assert_recorded(case, f"score_{level}", fusion.scores(high, low)[:, :, None, None])
                assert_recorded(case, f"fused{ending}_{level}", fusion(high, low))


def check_kd(case: Case) -> None:
    names = [f"p{level}" for level in range(5)]
    method = MSAD(
        pairs=[FeaturePair(name, name, 8, 8) for name in names],
        weights={"loss_msad": WEIGHT},
        schedule=build_schedule(SCHEDULE),
    )
    ours = [case.tensor(f"student_{level}").requires_grad_() for level in range(5)]
    theirs = [case.tensor(f"teacher_{level}") for level in range(5)]
    with EventStorage() as storage:
        runs = [SimpleNamespace(features=dict(zip(names, maps))) for maps in (ours, theirs)]
        loss = method(*runs)["loss_msad"]
        assert storage.latest()["msad/raw"][0] == loss.item()
    counts = case.tensor("counts").tolist()
    assert_recorded(case, "loss", [loss.item() * method.weight_at("loss_msad", count) for count in counts])
    (loss * method.weight_at("loss_msad", 250)).backward()
    for level, feature in enumerate(ours):
        assert_recorded_gradient(case, f"grad_count250_{level}", feature.grad)


def check_teacher_step(case: Case) -> None:
    model = load(build_teacher(case.data["fusion_variant"]), case, TEACHER).train()
    inputs = inputs_of(case)
    run = stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])
    with EventStorage():
        losses = run.losses
    if "fr_feat_0" in case.arrays:
        for level, feature in enumerate(run.features.values()):
            assert_recorded(case, f"fr_feat_{level}", feature)
    names = {
        f"{theirs}_{ending}": f"{ours}_{ending}" for theirs, ours in LOSSES.items() for ending in BRANCHES.values()
    }
    assert set(names.values()) == set(losses)
    for theirs, ours in names.items():
        assert_recorded(case, f"loss.{theirs}", losses[ours])
    assert_recorded(case, "loss.total", sum(losses.values()))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_state(case, model, TEACHER)


def check_student_step(case: Case) -> None:
    """The teacher's batch norms use and update batch statistics in the reference."""
    inputs = inputs_of(case)
    inherited = INHERIT if case.data["student_equals_teacher_at_start"] else ()
    for index, count in enumerate(case.data["counts"]):
        teacher_model = load(build_teacher(), case, TEACHER)
        student = build_low_resolution_student()
        if not inherited:
            load(student, case, STUDENT)
        teacher = Teacher(teacher_model, input_format="BGR", batch_statistics=True)
        cfg = toy_cfg("OpenMMLabFCOS", "toy_low_resolution_pyramid")
        method = MSAD(**MSAD.from_config(cfg, stage_detector(student), teacher))
        model = Distiller(
            student=student, teacher=teacher, methods=nn.ModuleDict({"MSAD": method}), input_format="BGR",
            inherited=inherited,
        ).train()
        with EventStorage(count):
            losses = model(inputs)
        for theirs, ours in LOSSES.items():
            assert_recorded(case, f"loss{index}.{theirs}_st", losses[ours])
        assert_recorded(case, f"loss{index}.loss_kd", losses["loss_msad"])
    sum(losses.values()).backward()
    assert_state(case, student, STUDENT)
    assert_state(case, teacher_model, TEACHER)


def check_inference(case: Case, model: nn.Module) -> None:
    height, width = case.data["output_height_width"]
    inputs = [{**each, "height": height, "width": width} for each in inputs_of(case)]
    with torch.no_grad():
        [found] = model.eval()(inputs)
    found = found["instances"]
    assert len(found) == case.data["num"] and found.image_size == (height, width)
    assert_recorded(case, "boxes", found.pred_boxes.tensor)
    assert_recorded(case, "scores", found.scores)
    assert_recorded(case, "classes", found.pred_classes)


def check_teacher_inference(case: Case) -> None:
    check_inference(case, load(build_teacher(), case, TEACHER))


def check_student_inference(case: Case) -> None:
    check_inference(case, load(build_low_resolution_student(), case, STUDENT))


CHECKS = {
    "preprocess": check_preprocess,
    "fusion": check_fusion,
    "kd": check_kd,
    "toy_teacher_step": check_teacher_step,
    "toy_student_step": check_student_step,
    "toy_teacher_inference": check_teacher_inference,
    "toy_student_inference": check_student_inference,
}
