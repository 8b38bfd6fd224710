"""Anchors, heads, box coding, losses and inference of the detectors of localisation distillation."""

from __future__ import annotations

import functools

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.assigners import valid_locations
from d2_distill.boxes.geometry import boxes_from_distances, distances_to_sides
from d2_distill.detectors import GFL, GFLv2, TowerDetector
from d2_distill.detectors.box_coders import DistributionCoder
from d2_distill.detectors.nms import select_nms

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient, assert_recorded_sum
from ..openmmlab import BOX_LOSSES, build_detector, flat_outputs, instances_of, load_head

STRIDES = (8, 16, 32, 64, 128)


def maps_of(case: Case, key: str, requires_grad: bool = False) -> list[torch.Tensor]:
    """Recorded maps ``<key><level>``, in float32."""
    names = [f"{key}{level}" for level in range(len(STRIDES)) if f"{key}{level}" in case.arrays]
    return [case.tensor(name).float().requires_grad_(requires_grad) for name in names]


def check_anchors(case: Case) -> None:
    strides, grid_sizes = case.arrays["in_strides"].tolist(), case.arrays["in_feat_sizes"].tolist()
    generator = DefaultAnchorGenerator(
        sizes=[[8.0 * stride] for stride in strides], aspect_ratios=[[1.0]], strides=strides, offset=0.0
    )
    anchors = generator([torch.zeros(1, 1, *size) for size in grid_sizes])
    assert_recorded(case, "out_num_level", [len(boxes) for boxes in anchors])
    assert_recorded(case, "out_anchors", torch.cat([boxes.tensor for boxes in anchors]))
    valid = valid_locations(tuple(case.arrays["in_pad_shape"].tolist()), grid_sizes, strides)
    assert torch.equal(valid, case.tensor("out_valid"))


def check_head_forward(case: Case) -> None:
    params, prefix = case.data["params"], "in_w_"
    model_class = GFLv2 if "in_w_reg_conf__0__weight" in case.arrays else GFL
    features = maps_of(case, "in_feat")
    model = build_detector(
        model_class,
        features,
        list(STRIDES[: len(features)]),
        params["num_classes"],
        num_convs=params["stacked_convs"],
        norm=functools.partial(nn.GroupNorm, 32),
    )
    weights = {key[len(prefix) :]: case.tensor(key) for key in case.arrays if key.startswith(prefix)}
    load_head(model, {name.replace("__", "."): value for name, value in weights.items()})
    logits, deltas = model.head(features)
    for level, (of_level, boxes) in enumerate(zip(logits, deltas)):
        assert_recorded(case, f"out_reg{level}", boxes)
        if model_class is GFL:
            assert_recorded(case, f"out_cls{level}", of_level)
            continue
        assert_recorded(case, f"out_cls_logit{level}", of_level)
        flat = {"logits": of_level.permute(0, 2, 3, 1), "deltas": boxes.permute(0, 2, 3, 1)}
        assert_recorded(case, f"out_joint_score{level}", model.class_scores(flat).permute(0, 3, 1, 2))


def check_integral(case: Case) -> None:
    logits = case.tensor("in_logits").float().requires_grad_()
    distances = DistributionCoder(case.data["params"]["reg_max"]).distances(logits)
    distances.sum().backward()
    assert_recorded(case, "out_dist", distances)
    assert_recorded(case, "out_grad_of_sum", logits.grad)


def check_distance_coder(case: Case) -> None:
    points = case.tensor("in_points")
    sides = distances_to_sides(points, case.tensor("in_boxes"))
    assert_recorded(case, "out_encoded_noclamp", sides)
    assert_recorded(case, "out_encoded", DistributionCoder(case.data["params"]["max_dis"]).targets(sides))
    boxes = boxes_from_distances(points, case.tensor("in_dist"))
    assert_recorded(case, "out_decoded", boxes)
    clipped = Boxes(boxes)
    clipped.clip((12, 16))
    assert_recorded(case, "out_decoded_clip", clipped.tensor)


def build_gfl(case: Case, maps: list[torch.Tensor], **overrides) -> TowerDetector:
    return build_detector(GFL, maps, list(STRIDES), case.data["params"]["num_classes"], **overrides)


def check_gfl_loss(case: Case) -> None:
    """Without a positive the reference divides by 0; only the class loss is of use then."""
    logits, deltas = maps_of(case, "in_s_cls", True), maps_of(case, "in_s_reg", True)
    model = build_gfl(case, logits, box_loss=BOX_LOSSES[case.data["params"]["box_loss"]])
    anchors = model.anchor_generator(logits)
    gt_instances = [
        instances_of(size, case.tensor(f"in_gt_bboxes{image}"), case.tensor(f"in_gt_labels{image}"))
        for image, size in enumerate(case.arrays["in_pad_shapes"].tolist())
    ]
    assignment = model.assign(anchors, gt_instances)
    with EventStorage():
        terms = model.losses(anchors, flat_outputs(model, logits=logits, deltas=deltas), assignment)
    assert list(terms) == ["loss_cls", "loss_box_reg", "loss_dfl"]
    sum(terms.values()).backward()
    assert_recorded_sum(case, "out_loss_cls", terms["loss_cls"])
    if not assignment.foreground.any():
        assert case.tensor("out_total").isnan() and terms["loss_box_reg"] == terms["loss_dfl"] == 0
        assert all(x.grad.isfinite().all() for x in logits) and not any(x.grad.any() for x in deltas)
        return
    assert_recorded_sum(case, "out_loss_bbox", terms["loss_box_reg"])
    assert_recorded_sum(case, "out_loss_dfl", terms["loss_dfl"])
    assert_recorded(case, "out_total", sum(terms.values()))
    for key, maps in (("cls", logits), ("reg", deltas)):
        for level, x in enumerate(maps):
            assert_recorded_gradient(case, f"out_grad_s_{key}{level}", x.grad)


def check_inference(case: Case) -> None:
    """The reference suppresses, with voting, what is scaled to the original image, as ``select_nms`` does."""
    params, (height, width) = case.data["params"], case.arrays["in_img_shape"].tolist()
    logits, deltas = maps_of(case, "in_s_cls"), maps_of(case, "in_s_reg")
    model = build_gfl(
        case,
        logits,
        test_score_thresh=params["score_thr"],
        test_topk_candidates=params["nms_pre"],
        test_nms_thresh=params["iou_threshold"],
        max_detections_per_image=params["max_per_img"],
    ).eval()
    model.head.register_forward_hook(lambda *_: [logits, deltas])
    if "voting" in case.name:
        select_nms(model, "voting_cluster_diou_nms")
    x_scale, y_scale = case.arrays["in_scale_factor"][:2].tolist()
    inputs = [
        {
            "image": torch.zeros(3, height, width),
            "height": round(height / y_scale),
            "width": round(width / x_scale),
        }
    ] * len(logits[0])
    for index, output in enumerate(model(inputs)):
        found = output["instances"]
        detections = torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1)
        assert_recorded(case, f"out_dets{index}", detections)
        assert_recorded(case, f"out_labels{index}", found.pred_classes)


CHECKS = {
    "anchors": check_anchors,
    "distance_coder": check_distance_coder,
    "gfl_loss": check_gfl_loss,
    "head_forward": check_head_forward,
    "inference": check_inference,
    "integral": check_integral,
}
