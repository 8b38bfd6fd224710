"""Recorded terms of HEAD: one AKD term, and whole training-loss evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.assistants.proposals import DenseProposer, has_position
from d2_distill.assistants.roi import RoIAssistant
from d2_distill.assistants.tracing import TracedAdapter
from d2_distill.detectors import OpenMMLabRetinaNet
from d2_distill.methods import HEAD
from d2_distill.methods.assist_rois import TracedRoIs
from d2_distill.methods.assistance import Assistance, mimicry_loss
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import Tap, stage_detector

from .. import openmmlab
from ..cases import Case
from ..dispatch import assert_close, assert_recorded, assert_recorded_sum

NUM_FC = 2
WEIGHTS = {"loss_assist": 1.0, "loss_akd": 2.0, "loss_ckd": 2.0}
WARMUP = {"loss_assist": [], "loss_akd": [["Warmup", 2000]], "loss_ckd": [["Warmup", 2000]]}


def _method(setting: nn.Module) -> HEAD:
    return HEAD(
        setting=setting,
        weights=WEIGHTS,
        schedule={term: build_schedule(factors) for term, factors in WARMUP.items()},
    )


def check_akd_term(case: Case) -> None:
    adapter = nn.Linear(12, 12)
    adapter.load_state_dict({name: case.tensor(name) for name in ("weight", "bias")})
    assistant = case.tensor("assistant").requires_grad_()
    method = _method(nn.Identity())

    def weighted(iteration: int) -> torch.Tensor:
        value = mimicry_loss([(adapter(assistant), case.tensor("teacher"))])
        return method.weight_at("loss_akd", iteration) * value

    assert_recorded(case, "loss", [weighted(iteration) for iteration in case.arrays["iterations"].tolist()])
    weighted(500).backward()
    assert_recorded(case, "grad_assistant_it500", assistant.grad)
    assert_recorded(case, "grad_weight_it500", adapter.weight.grad)


class FullHead:
    """The recorded student, teacher, assistant and adapters, as our modules."""

    def __init__(self, case: Case) -> None:
        data = case.data
        self.case, self.num_classes = case, data["num_classes"]
        self.maps = [case.tensor(f"student_p{level}").requires_grad_() for level in range(3, 8)]
        self.student = openmmlab.build_detector(
            OpenMMLabRetinaNet, self.maps, data["strides_student"], self.num_classes, num_convs=4
        )
        prefix = "w_student_head."
        openmmlab.load_head(
            self.student, {key[len(prefix) :]: case.tensor(key) for key in case.arrays if key.startswith(prefix)}
        )
        proposals = data["proposal_cfg"]
        staged = stage_detector(self.student)
        shapes = list(staged.feature_shapes().items())[: len(data["student_roi_strides"])]
        self.setting = TracedRoIs(
            proposer=DenseProposer(
                pre_nms_topk=proposals["nms_pre"],
                post_nms_topk=proposals["max_per_img"],
                nms_thresh=proposals["nms_iou"],
                min_box_size=proposals["min_bbox_size"],
            ),
            assistant=RoIAssistant.build(self._cfg(dict(shapes)), dict(shapes), self.num_classes),
            teacher_dims=[self._fc_dim] * NUM_FC,
            cross=TracedAdapter(staged, Tap(4), self._fc_dim, per_anchor=False),
        )
        self._load_heads(self.setting.assistant.roi_heads, "assistant")
        adapters = dict(zip(("aux", "last"), self.setting.akd[0]), cross=self.setting.cross.linear)
        for name, adapter in adapters.items():
            adapter.load_state_dict({part: case.tensor(f"w_adapt_{name}.{part}") for part in ("weight", "bias")})
        self.method = _method(self.setting)
        images = ImageList(torch.zeros(2, 3, *data["pad_shape"]), [tuple(size) for size in data["img_shapes"]])
        gt_instances = [
            openmmlab.instances_of(size, case.tensor(f"gt_boxes_{i}"), case.tensor(f"gt_labels_{i}"))
            for i, size in enumerate(images.image_sizes)
        ]
        self.run = staged.run(images, gt_instances, taps=self.method.taps())
        self.teacher_run = stage_detector(self._teacher()).run(images, gt_instances, frozen=True)

    @property
    def _fc_dim(self) -> int:
        return len(self.case.tensor("w_teacher.bbox_head.shared_fcs.0.bias"))

    def _cfg(self, shapes: dict[str, ShapeSpec]):
        cfg = get_cfg()
        heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        heads.NAME, heads.NUM_CLASSES, heads.IN_FEATURES = "StandardROIHeads", self.num_classes, list(shapes)
        box_head.NAME, box_head.NUM_FC, box_head.FC_DIM = "FastRCNNConvFCHead", NUM_FC, self._fc_dim
        box_head.POOLER_RESOLUTION = 7
        return cfg

    def _teacher(self) -> GeneralizedRCNN:
        maps = [self.case.tensor(f"teacher_p{level}") for level in range(2, 6)]
        backbone = openmmlab.GivenMaps(maps, self.case.data["teacher_roi_strides"])
        shapes = backbone.output_shape()
        heads = StandardROIHeads(self._cfg(shapes), shapes)
        self._load_heads(heads, "teacher")
        return GeneralizedRCNN(
            backbone=backbone, proposal_generator=nn.Identity(), roi_heads=heads, pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        )

    def _load_heads(self, heads: StandardROIHeads, role: str) -> None:
        """The recorded box head; both take the pooled maps in the order channel, y, x."""
        names = {f"shared_fcs.{i}": f"box_head.fc{i + 1}" for i in range(NUM_FC)}
        names.update({"fc_cls": "box_predictor.cls_score", "fc_reg": "box_predictor.bbox_pred"})
        heads.load_state_dict({
            f"{ours}.{part}": self.case.tensor(f"w_{role}.bbox_head.{theirs}.{part}")
            for theirs, ours in names.items()
            for part in ("weight", "bias")
        })

    def in_recorded_order(self, sampled: Sequence[Instances]) -> torch.Tensor:
        """Row of ours for each recorded RoI: ours are drawn in random order."""
        ours = [
            (image, *row)
            for image, instances in enumerate(sampled)
            for row in instances.positions.tolist()
        ]
        recorded = self.case.tensor("roi_ids").long()
        recorded[:, 4] = torch.where(recorded[:, 1] < 0, recorded[:, 4], _our_anchors(self, recorded[:, 4]))
        assert sorted(ours) == sorted(map(tuple, recorded.tolist()))
        return torch.tensor([ours.index(tuple(row)) for row in recorded.tolist()])


def _our_anchors(full: FullHead, anchors: torch.Tensor) -> torch.Tensor:
    """Index in Detectron2's order of anchors in the recorded order; gt indices go through unharmed."""
    order = openmmlab.in_our_order(full.student, torch.arange(9)).argsort()
    return order[anchors.clamp(max=8)]


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
        _check_proposals(full)
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
    akd = case.tensor("loss.loss_mimic_rcnn_aux") + case.tensor("loss.loss_mimic_rcnn")
    assert_close(case, "loss_akd", terms["loss_akd"], akd)
    assert_recorded(case, "loss.loss_cross", terms["loss_ckd"])
    assert_recorded(case, "loss_total", sum(student.values()) + sum(terms.values()))
    accuracy, _ = storage.latest()["assist/fast_rcnn/cls_accuracy"]
    assert_close(case, "acc", [accuracy * 100], case.tensor("acc"))
    assert storage.latest()["assist/loss_box_reg"][0] == losses["loss_box_reg"].item()
    groups = {
        "student": sum(student.values()),
        "assistant": terms["loss_assist"],
        "akd": terms["loss_akd"],
        "ckd": terms["loss_ckd"],
    }
    for group, value in groups.items():
        gradients = torch.autograd.grad(value, full.maps, retain_graph=True, allow_unused=True)
        for level, gradient in enumerate(gradients, start=3):
            if f"{group}.p{level}" in case.data["no_gradient"]:
                assert gradient is None or not gradient.any()
            else:
                assert_recorded(case, f"grad_{group}_p{level}", gradient)


def _check_proposals(full: FullHead) -> None:
    case = full.case
    for image, proposals in enumerate(full.setting.proposer.propose(full.run)):
        boxes, scores, positions = case.tensor(f"proposals_{image}").split([4, 1, 4], dim=1)
        assert_close(case, f"proposals_{image} boxes", proposals.proposal_boxes.tensor, boxes)
        assert_close(case, f"proposals_{image} scores", proposals.objectness_logits.sigmoid(), scores[:, 0])
        positions = positions.long()
        positions[:, 3] = _our_anchors(full, positions[:, 3])
        assert torch.equal(proposals.positions, positions)


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
    kept = has_position([image.positions for image in sampled])
    order = (kept.cumsum(dim=0) - 1)[order[kept[order]]]
    (adapted, target), = assistance.ckd
    assert_recorded(case, "t_retina_cls_decoupled", adapted[order])
    assert_recorded(case, "t_teacher_rcnn_bbox_filtered", target[order])


CHECKS = {"akd_term": check_akd_term, "full_head": check_full_head}
