"""Recorded terms of HEAD: one AKD term, and whole training-loss evaluations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.assistants.proposals import gather_positions, has_position
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.building import build_detector
from d2_distill.methods import HEAD, build_methods
from d2_distill.methods.assistance import Assistance, mimicry_loss
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from .. import openmmlab
from ..cases import Case
from ..dispatch import assert_close, assert_recorded, assert_recorded_sum
from .head_basics import level_names, numbers_of
from .head_proposals import in_recorded_positions


def check_akd_term(case: Case) -> None:
    weight, length = numbers_of(case, r"weight ([\d.]+) \((\d+) iterations\)")
    adapter = nn.Linear(*case.arrays["weight"].shape[::-1])
    adapter.load_state_dict({name: case.tensor(name) for name in ("weight", "bias")})
    assistant = case.tensor("assistant").requires_grad_()
    method = HEAD(
        setting=nn.Identity(),
        weights={"loss_akd": weight},
        schedule={"loss_akd": build_schedule([["Warmup", int(length)]])},
    )

    def weighted(iteration: int) -> torch.Tensor:
        value = mimicry_loss([(adapter(assistant), case.tensor("teacher"))])
        return method.weight_at("loss_akd", iteration) * value

    assert_recorded(case, "loss", [weighted(iteration).item() for iteration in case.arrays["iterations"].tolist()])
    gradients = [re.fullmatch(r"grad_(\w+)_it(\d+)", key) for key in case.arrays if key.startswith("grad_")]
    inputs = {"assistant": assistant, **dict(adapter.named_parameters())}
    for match in gradients:
        (gradient,) = torch.autograd.grad(weighted(int(match[2])), inputs[match[1]])
        assert_recorded(case, match[0], gradient)


def count_of(pattern: str, names: Iterable[str]) -> int:
    """How many names match."""
    return sum(re.fullmatch(pattern, name) is not None for name in names)


class FullHead:
    """The recorded student, teacher, assistant and adapters, as our modules."""

    def __init__(self, case: Case) -> None:
        data = case.data
        self.case, self.levels = case, level_names(case, "student_")
        self.maps = [case.tensor(f"student_{level}").requires_grad_() for level in self.levels]
        self.student = self._build_student()
        images = ImageList(
            torch.zeros(len(self.maps[0]), 3, *data["pad_shape"]), [tuple(size) for size in data["img_shapes"]]
        )
        gt_instances = [
            openmmlab.instances_of(size, case.tensor(f"gt_boxes_{i}"), case.tensor(f"gt_labels_{i}"))
            for i, size in enumerate(images.image_sizes)
        ]
        staged = stage_detector(self.student)
        grids = [tuple(x.shape[-2:]) for x in self.maps]
        strides = data["strides_student"]
        assert grids == [tuple(-(-side // stride) for side in data["pad_shape"]) for stride in strides]
        teacher = self._build_teacher()
        cfg = get_distill_cfg()
        openmmlab.set_keys(cfg, self._settings(staged))
        self.method = build_methods(cfg, staged, teacher)["HEAD"]
        self.setting = self.method.setting
        heads, theirs = self.setting.assistant.roi_heads, teacher.model.roi_heads
        is_copy = all(torch.equal(x, theirs.state_dict()[name]) for name, x in heads.state_dict().items())
        assert is_copy == data["weight_transfer_was_exact_before_perturbation"]
        self._load_heads(heads, "assistant")
        adapters = dict(zip(("aux", "last"), self.setting.akd[0]), cross=self.setting.cross.linear)
        for name, adapter in adapters.items():
            adapter.load_state_dict({part: case.tensor(f"w_adapt_{name}.{part}") for part in ("weight", "bias")})
        self.run = staged.run(images, gt_instances, taps=self.method.taps())
        self.teacher_run = teacher.staged.run(images, gt_instances, frozen=True)

    def _settings(self, staged) -> dict[str, Any]:
        """Keys below MODEL of the method."""
        data, proposals = self.case.data, self.case.data["proposal_cfg"]
        settings = {
            "DISTILL.METHODS": ("HEAD",),
            "DISTILL.HEAD.ASSISTANT_INIT": "teacher",
            "DISTILL.HEAD.IN_FEATURES": [
                name for name, shape in staged.feature_shapes().items() if shape.stride in data["student_roi_strides"]
            ],
            "DISTILL.HEAD.PER_ANCHOR": len(self.case.arrays["w_adapt_cross.bias"]) > self._fc_dim,
            "RPN.PRE_NMS_TOPK_TRAIN": proposals["nms_pre"],
            "RPN.POST_NMS_TOPK_TRAIN": proposals["max_per_img"],
            "RPN.NMS_THRESH": proposals["nms_iou"],
            "PROPOSAL_GENERATOR.MIN_SIZE": proposals["min_bbox_size"],
        }
        for part in ("akd", "ckd"):
            weight = data[f"{part}_weight"]
            assert weight["type"] == "warmup"
            settings[f"DISTILL.HEAD.{part.upper()}_WEIGHT"] = weight["value"]
            settings[f"DISTILL.HEAD.{part.upper()}_SCHEDULE"] = [["Warmup", weight["iters"]]]
        return settings

    def _build_student(self) -> nn.Module:
        data, prefix = self.case.data, "w_student_head."
        strides = list(data["strides_student"])
        weights = {key[len(prefix) :]: self.case.tensor(key) for key in self.case.arrays if key.startswith(prefix)}
        settings = {
            "RETINANET.NUM_CLASSES": data["num_classes"],
            "RETINANET.NUM_CONVS": count_of(r"cls_convs\.\d+\.conv\.weight", weights),
            **openmmlab.anchor_settings(strides, **openmmlab.RETINANET_ANCHORS),
        }
        student = openmmlab.build_given("OpenMMLabRetinaNet", strides, settings, maps=self.maps)
        openmmlab.load_head(student, weights)
        return student

    @property
    def _fc_dim(self) -> int:
        return len(self.case.arrays["w_teacher.bbox_head.shared_fcs.0.bias"])

    def _build_teacher(self) -> Teacher:
        data = self.case.data
        maps = [self.case.tensor(f"teacher_{level}") for level in level_names(self.case, "teacher_")]
        strides, channels = list(data["teacher_roi_strides"]), maps[0].shape[1]
        fc_inputs = self.case.arrays["w_teacher.bbox_head.shared_fcs.0.weight"].shape[1]
        sampler = re.fullmatch(
            r"num (\d+), pos_fraction ([\d.]+), gt added; nothing is dropped at this size, so there is no randomness",
            data["sampler"],
        )
        names = [f"p{level}" for level in range(len(strides))]
        cfg = openmmlab.given_cfg("GeneralizedRCNN", strides, channels, {
            "PROPOSAL_GENERATOR.NAME": "RPN",
            "RPN.IN_FEATURES": names,
            "ANCHOR_GENERATOR.SIZES": [[8 * stride] for stride in strides],
            "ROI_HEADS.NAME": "StandardROIHeads",
            "ROI_HEADS.IN_FEATURES": names,
            "ROI_HEADS.NUM_CLASSES": data["num_classes"],
            "ROI_HEADS.BATCH_SIZE_PER_IMAGE": int(sampler[1]),
            "ROI_HEADS.POSITIVE_FRACTION": float(sampler[2]),
            "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "ROI_BOX_HEAD.NUM_FC": self._num_fc("teacher"),
            "ROI_BOX_HEAD.FC_DIM": self._fc_dim,
            "ROI_BOX_HEAD.POOLER_RESOLUTION": math.isqrt(fc_inputs // channels),
        })
        model = build_detector(cfg)
        model.backbone.maps = maps
        self._load_heads(model.roi_heads, "teacher")
        return Teacher(model, input_format=cfg.INPUT.FORMAT, cfg=cfg)

    def _num_fc(self, role: str) -> int:
        return count_of(rf"w_{role}\.bbox_head\.shared_fcs\.\d+\.bias", self.case.arrays)

    def _load_heads(self, heads: nn.Module, role: str) -> None:
        """The recorded box head; both take the pooled maps in the order channel, y, x."""
        names = {f"shared_fcs.{i}": f"box_head.fc{i + 1}" for i in range(self._num_fc(role))}
        names.update({"fc_cls": "box_predictor.cls_score", "fc_reg": "box_predictor.bbox_pred"})
        heads.load_state_dict({
            f"{ours}.{part}": self.case.tensor(f"w_{role}.bbox_head.{theirs}.{part}")
            for theirs, ours in names.items()
            for part in ("weight", "bias")
        })

    def recorded_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Ours in the recorded order of anchors; those of ground truth, whose last entry is its index, as they are."""
        known = in_recorded_positions(self.student, positions.clamp(max=len(self.anchors) - 1))
        return torch.where(positions[:, :1] < 0, positions, torch.cat([positions[:, :3], known[:, 3:]], dim=1))

    @property
    def anchors(self) -> torch.Tensor:
        return openmmlab.recorded_anchors(self.student)

    def in_recorded_order(self, sampled: Sequence[Instances]) -> torch.Tensor:
        """Row of ours for each recorded RoI: ours are drawn in random order."""
        ours = [
            (image, *row)
            for image, instances in enumerate(sampled)
            for row in self.recorded_positions(instances.positions).tolist()
        ]
        recorded = self.case.tensor("roi_ids").long().tolist()
        assert sorted(ours) == sorted(map(tuple, recorded))
        return torch.tensor([ours.index(tuple(row)) for row in recorded])


def _recording(module: nn.Module) -> list[tuple]:
    """Fills with the arguments and the result of each call of the module."""
    calls: list[tuple] = []
    module.register_forward_hook(lambda _, arguments, result: calls.append((arguments, result)))
    return calls


def check_full_head(case: Case) -> None:
    full = FullHead(case)
    run, iteration = full.run, case.data["iteration"]
    with EventStorage(iteration) as storage:
        student = dict(run.losses)
        _check_student(full)
        settings, assistants = _recording(full.setting), _recording(full.setting.assistant)
        terms = full.method(run, full.teacher_run)
        terms = {term: full.method.weight_at(term, iteration) * value for term, value in terms.items()}
    (_, assistance), ((_, sampled, _), rois) = settings[0], assistants[0]
    _check_intermediates(full, sampled, rois.stages[0].outputs.vectors, assistance)

    losses = assistance.losses
    assert_recorded_sum(case, "loss.loss_cls_rpn", student["loss_cls"])
    assert_recorded_sum(case, "loss.loss_bbox_rpn", student["loss_box_reg"])
    assert_recorded(case, "loss.loss_cls", losses["loss_cls"])
    assert_recorded(case, "loss.loss_bbox", losses["loss_box_reg"])
    akd_weight = full.method.weight_at("loss_akd", iteration)
    for pair, name in zip(assistance.akd, ("loss_mimic_rcnn_aux", "loss_mimic_rcnn")):
        assert_recorded(case, f"loss.{name}", akd_weight * mimicry_loss([pair]))
    assert_close(case, "loss_akd", terms["loss_akd"], sum(
        case.tensor(f"loss.{name}") for name in ("loss_mimic_rcnn_aux", "loss_mimic_rcnn")
    ))
    assert_recorded(case, "loss.loss_cross", terms["loss_ckd"])
    assert_recorded(case, "loss_total", sum(student.values()) + sum(terms.values()))
    accuracy, _ = storage.latest()["assist/fast_rcnn/cls_accuracy"]
    assert_recorded(case, "acc", [accuracy * 100])
    assert storage.latest()["assist/loss_box_reg"][0] == losses["loss_box_reg"].item()
    _check_gradients(full, {
        "student": sum(student.values()),
        "assistant": terms["loss_assist"],
        "akd": terms["loss_akd"],
        "ckd": terms["loss_ckd"],
    })


def _check_gradients(full: FullHead, groups: Mapping[str, torch.Tensor]) -> None:
    """Of the student's maps; what has no gradient is listed."""
    case, without = full.case, []
    for group, value in groups.items():
        gradients = torch.autograd.grad(value, full.maps, retain_graph=True, allow_unused=True)
        for level, gradient in zip(full.levels, gradients):
            if f"grad_{group}_{level}" in case.arrays:
                assert_recorded(case, f"grad_{group}_{level}", gradient)
            else:
                assert gradient is None or not gradient.any()
                without.append(f"{group}.{level}")
    assert sorted(without) == case.data["no_gradient"]


def _check_student(full: FullHead) -> None:
    """Its predictions, the end of its class tower, and what it proposes."""
    case, run = full.case, full.run
    ends = run.taps["cls"][run.staged.towers["cls"].end]
    for level, name in enumerate(full.levels):
        for key, output in (("cls_logits", "logits"), ("deltas", "deltas")):
            expected = openmmlab.in_our_order(full.student, case.tensor(f"{key}_{name}"), dim=1)
            assert_close(case, f"{key}_{name}", run.predictions[output][level], expected)
        assert_recorded(case, f"cls_tower_{name}", ends[level])
    for image, proposals in enumerate(full.setting.proposer.propose(run)):
        assert_recorded(case, f"proposals_{image}", torch.cat([
            proposals.proposal_boxes.tensor,
            proposals.objectness_logits.sigmoid()[:, None],
            full.recorded_positions(proposals.positions).float(),
        ], dim=1))


def _check_intermediates(
    full: FullHead, sampled: list[Instances], vectors: list[torch.Tensor], assistance: Assistance
) -> None:
    case, order = full.case, full.in_recorded_order(sampled)
    boxes = torch.cat([image.proposal_boxes.tensor for image in sampled])
    rois = torch.cat([case.tensor(f"rois_{image}") for image in range(len(sampled))])
    assert_close(case, "rois", boxes[order], rois)
    for (adapted, target), name in zip(assistance.akd, ("rcnn_bbox_aux", "rcnn_bbox")):
        assert_recorded(case, f"t_{name}_adapted", adapted[order])
        assert_recorded(case, f"t_teacher_{name}", target[order])
    for rows, name in zip(vectors, ("rcnn_bbox_aux", "rcnn_bbox")):
        assert_recorded(case, f"t_{name}", rows[order])
    # The rows of CKD are those of the RoIs with a position.
    positions = [image.positions for image in sampled]
    images = torch.cat([torch.full((len(rows),), image) for image, rows in enumerate(positions)])
    kept = has_position(positions)
    order = (kept.cumsum(dim=0) - 1)[order[kept[order]]]
    (adapted, target), = assistance.ckd
    assert_recorded(case, "t_retina_cls_decoupled", adapted[order])
    assert_recorded(case, "t_teacher_rcnn_bbox_filtered", target[order])
    run = full.run
    gathered = gather_positions(run.taps["cls"][full.setting.cross.tap], positions)
    assert_recorded(case, "t_retina_cls_indexed", gathered[order])
    level, y, x, anchor = full.recorded_positions(torch.cat(positions)[kept][order]).unbind(dim=1)
    assert_recorded(case, "t_bbox_poses", torch.stack([level, images[kept][order], y, x], dim=1))
    assert_recorded(case, "t_anchor_ids", anchor)


CHECKS = {"akd_term": check_akd_term, "full_head": check_full_head}
