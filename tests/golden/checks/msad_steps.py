"""The published MSAD code's resolutions, fusion and distillation term, and whole steps on a toy backbone."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from d2_distill.methods import MSAD, build_methods
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_close, assert_close_gradient, assert_recorded, assert_recorded_gradient
from ..openmmlab import instances_of, point_bounds, set_keys
from .msad_head import MSAD_FCOS, maps_of

# Our losses by their published names.
LOSSES = {"loss_fcos_cls": "loss_cls", "loss_fcos_loc": "loss_box_reg", "loss_fcos_ctr": "loss_centerness"}
# What a published state dict's prefixes are in ours.
TEACHER = {"T_backbone.": "detector.backbone.", "T_fcos_head.": "detector.head.", "SE.": "fusion."}
STUDENT = {"S_backbone.": "backbone.pyramid.", "S_fcos_head.": "head."}
INHERIT = ("backbone.pyramid=detector.backbone", "head=detector.head")
STATISTICS = ("running_mean", "running_var")


class ToyPyramid(Backbone):
    """The recordings' backbone: p_k = BatchNorm(Conv1x1(average over cells of 2^k pixels))."""

    def __init__(self, levels: Sequence[int], channels: int, **norm: float) -> None:
        super().__init__()
        self.levels, self.channels = levels, channels
        for level in levels:
            self.add_module(f"conv{level}", nn.Conv2d(3, channels, 1))
            self.add_module(f"bn{level}", nn.BatchNorm2d(channels, **norm))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{level}": ShapeSpec(channels=self.channels, stride=2**level) for level in self.levels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        modules = dict(self.named_children())
        return {
            f"p{level}": modules[f"bn{level}"](modules[f"conv{level}"](F.avg_pool2d(x, 2**level)))
            for level in self.levels
        }


@BACKBONE_REGISTRY.register()
def toy_pyramid(cfg, input_shape: ShapeSpec) -> ToyPyramid:
    """Of the levels and with the options of MODEL.TOY."""
    node = cfg.MODEL.TOY
    return ToyPyramid(node.LEVELS, node.CHANNELS, eps=node.EPS, momentum=node.MOMENTUM)


@BACKBONE_REGISTRY.register()
def toy_low_resolution_pyramid(cfg, input_shape: ShapeSpec) -> LowResolution:
    return LowResolution(toy_pyramid(cfg, input_shape), factor=cfg.MODEL.LOW_RESOLUTION.FACTOR)


class Toys:
    """The toy detectors of a case, from its parameters.

    Attributes:
        cfg: of the method, and of what the detectors share.
        levels: of the recorded backbone, some of which the student does not have.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.params = case, case.data["params"]
        toy = re.fullmatch(
            r"Toy backbone \(test double\): for k in (\d)\.\.(\d), p_k = BatchNorm2d_k\(Conv1x1_k\(avg_pool2d\(x, 2\^k, "
            r"stride 2\^k\)\)\), conv 3->(\d+) with bias, BN eps ([\d.e-]+) momentum ([\d.]+); "
            r"the parameters are conv<k>\.weight/bias and bn<k>\.\*\. Towers have zero convolutions\.",
            case.data["toy_backbone"],
        )
        first, last, self._channels = (int(number) for number in toy.groups()[:3])
        self.levels = list(range(first, last + 1))
        self._norm = {"EPS": float(toy[4]), "MOMENTUM": float(toy[5])}
        assert self.params["others"] == "defaults"
        self.cfg = self._cfg("OpenMMLabFCOS", "toy_low_resolution_pyramid", self.low_levels)

    @property
    def low_levels(self) -> list[int]:
        return [int(name[1:]) for name in self.params["L_IN_FEATURES"]]

    def _cfg(self, detector: str, backbone: str, levels: list[int]) -> CfgNode:
        params, data = self.params, self.case.data
        cfg = get_distill_cfg()
        cfg.MODEL.TOY = CfgNode({"LEVELS": levels, "CHANNELS": self._channels, **self._norm})
        assert params["NUM_CLS_CONVS"] == params["NUM_BOX_CONVS"]
        fcos = {
            **MSAD_FCOS,
            "NUM_CLASSES": params["NUM_CLASSES"],
            "IN_FEATURES": list(params["H_IN_FEATURES"]),
            "NUM_CONVS": params["NUM_SHARE_CONVS"] + params["NUM_CLS_CONVS"],
            "SIZES_OF_INTEREST": point_bounds([tuple(ends) for ends in params["SIZES_OF_INTEREST"]]),
        }
        if "INFERENCE_TH_TEST" in data:
            fcos["SCORE_THRESH_TEST"] = data["INFERENCE_TH_TEST"]
        set_keys(cfg, {
            "META_ARCHITECTURE": detector,
            "BACKBONE.NAME": backbone,
            "DEVICE": "cpu",
            "PIXEL_MEAN": list(params["PIXEL_MEAN"]),
            "PIXEL_STD": list(params["PIXEL_STD"]),
            "MSAD.JOINT_WEIGHT": params["JOINT_WEIGHT"],
            "MSAD.FUSION_SCORE": data.get("fusion_variant", "per_image"),
            "DISTILL.METHODS": ("MSAD",),
            "DISTILL.MSAD.WEIGHT": params["KD_ALPHA"] * params["KD_TEMPERATURE"],
            **{f"FCOS.{key}": value for key, value in fcos.items()},
        })
        return cfg

    def teacher(self) -> nn.Module:
        model = build_detector(self._cfg("MultiScaleDetector", "toy_pyramid", self.levels))
        assert stage_detector(model).strides == list(self.params["FPN_STRIDES"])
        return load(model, self.case, TEACHER)

    def student(self) -> nn.Module:
        """Without the level that is recorded as computed but not used; with random weights."""
        model = build_detector(self.cfg)
        assert stage_detector(model).strides == list(self.params["FPN_STRIDES"])
        assert list(model.backbone.pyramid.output_shape()) == list(self.params["L_IN_FEATURES"])
        return model

    def unused(self) -> ToyPyramid:
        """The levels of the recorded backbone that the student does not have."""
        levels = [level for level in self.levels if level not in self.low_levels]
        norm = {key.lower(): value for key, value in self._norm.items()}
        return ToyPyramid(levels, self._channels, **norm)

    def is_unused(self, name: str) -> bool:
        """Whether a published name is of a level that the student does not have."""
        return name.startswith("S_backbone.") and name[len("S_backbone.") :] in self.unused().state_dict()

    def inputs(self) -> list[dict[str, Any]]:
        """The recorded images, whose sizes are as the case says, with the recorded ground truth."""
        case, inputs = self.case, images_of(self.case)
        sizes = [list(x["image"].shape[-2:]) for x in inputs]
        assert sizes == (case.data["image_sizes"] if "image_sizes" in case.data else [case.data["image_size"]])
        for index, x in enumerate(inputs):
            if f"gt_boxes_{index}" in case.arrays:
                boxes, classes = case.tensor(f"gt_boxes_{index}"), case.tensor(f"gt_classes_{index}").long()
                x["instances"] = instances_of(x["image"].shape[-2:], boxes, classes)
        return inputs


def images_of(case: Case) -> list[dict[str, Any]]:
    return [{"image": case.tensor(f"image_{i}")} for i in range(sum(key.startswith("image_") for key in case.arrays))]


def in_our_names(case: Case, group: str, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The recorded tensors ``<group>.<published name>`` of a model, by our names."""
    found = {}
    for published, ours in prefixes.items():
        start = f"{group}.{published}"
        keys = [key for key in case.arrays if key.startswith(start)]
        tensors = {key[len(start) :]: case.tensor(key).float() for key in keys}
        found.update({f"{ours}{name}": value for name, value in head_names(tensors).items()})
    return found


def published_names(case: Case, prefix: str) -> list[str]:
    """Recorded parameters whose published names begin so."""
    names = [key[len("w.") :] for key in case.arrays if key.startswith(f"w.{prefix}")]
    return [name for name in names if not name.endswith(STATISTICS)]


def load(model: nn.Module, case: Case, prefixes: dict[str, str]) -> nn.Module:
    """All recorded weights but those of a level that the model does not have."""
    state = in_our_names(case, "w", prefixes)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {name.split(".")[-1] for name in missing} <= {"num_batches_tracked"}
    assert all(re.search(r"\.(?:conv|bn)\d\.\w+$", name) for name in unexpected) and len(state) > len(unexpected)
    return model


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
