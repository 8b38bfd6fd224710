"""Anchors, heads, box coding and inference of the detectors of localisation distillation."""

from __future__ import annotations

import re

import torch
from detectron2.structures import Boxes

from d2_distill.boxes.anchor_grid import valid_cells
from d2_distill.boxes.geometry import boxes_from_distances, distances_to_sides
from d2_distill.detectors.box_coders import DistributionCoder
from d2_distill.detectors.nms import CLUSTER_NMS, OWN_NMS

from ..cases import Case
from ..dispatch import assert_recorded
from ..ld_runs import REG_MAX, STRIDES, maps_of
from ..openmmlab import assert_channels, build_given, given_run, level_sizes, load_head

# Published name of a suppression, such as "voting_cluster_diounms" -> TEST.NMS.
NMS = {name.replace("diou_nms", "diounms"): name for name in (OWN_NMS, *CLUSTER_NMS)}


def check_anchors(case: Case) -> None:
    assert not case.data["params"]
    strides, grids = case.arrays["in_strides"].tolist(), case.arrays["in_feat_sizes"].tolist()
    size = tuple(case.arrays["in_pad_shape"].tolist())
    model = build_given("GFL", strides, {"GFL.NUM_CLASSES": 1})
    channels = {"logits": 1, "deltas": model.box_coder.box_dim}
    maps = {output: [torch.zeros(1, number, *grid) for grid in grids] for output, number in channels.items()}
    run = given_run(model, maps, [size])
    assert_recorded(case, "out_num_level", level_sizes(run))
    assert_recorded(case, "out_anchors", run.grid.boxes)
    assert_recorded(case, "out_valid", valid_cells(size, grids, strides, size_divisibility=1))


def check_head_forward(case: Case) -> None:
    params, prefix = case.data["params"], "in_w_"
    has_quality = "in_w_reg_conf__0__weight" in case.arrays
    features = maps_of(case, "in_feat")
    model = build_given(
        "GFLv2" if has_quality else "GFL",
        STRIDES[: len(features)],
        {
            "GFL.NUM_CLASSES": params["num_classes"],
            "GFL.NUM_CONVS": params["stacked_convs"],
            "GFL.REG_MAX": params["reg_max"],
            "GFL.NORM": "GN",
        },
        maps=features,
    )
    assert features[0].shape[1] == params["feat_channels"]
    assert model.head.cls_score.out_channels == params["class_channels"]
    weights = {key[len(prefix) :]: case.tensor(key) for key in case.arrays if key.startswith(prefix)}
    load_head(model, {name.replace("__", "."): value for name, value in weights.items()})
    logits, deltas = model.head(features)
    for level, (of_level, boxes) in enumerate(zip(logits, deltas)):
        assert_recorded(case, f"out_reg{level}", boxes)
        if not has_quality:
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
    """The size of the image that boxes are clipped to is not recorded; it is the largest coordinate."""
    points = case.tensor("in_points")
    sides = distances_to_sides(points, case.tensor("in_boxes"))
    assert_recorded(case, "out_encoded_noclamp", sides)
    assert_recorded(case, "out_encoded", DistributionCoder(case.data["params"]["max_dis"]).targets(sides))
    boxes = boxes_from_distances(points, case.tensor("in_dist"))
    assert_recorded(case, "out_decoded", boxes)
    clipped = Boxes(boxes)
    width, height = case.tensor("out_decoded_clip").view(-1, 2).amax(dim=0).tolist()
    clipped.clip((height, width))
    assert_recorded(case, "out_decoded_clip", clipped.tensor)


def check_inference(case: Case) -> None:
    """The reference suppresses, with voting, what is scaled to the original image, as ours does.

    Its description tells how it suppresses.
    """
    suppression = re.match(r"Decode \+ (\w+);", case.data["description"])[1]
    params, (height, width) = case.data["params"], case.arrays["in_img_shape"].tolist()
    logits, deltas = maps_of(case, "in_s_cls"), maps_of(case, "in_s_reg")
    x_scale, y_scale, *others = case.arrays["in_scale_factor"].tolist()
    assert others == [x_scale, y_scale]
    model = build_given(
        "GFL",
        STRIDES,
        {
            "GFL.NUM_CLASSES": params["num_classes"],
            "GFL.REG_MAX": REG_MAX,
            "GFL.SCORE_THRESH_TEST": params["score_thr"],
            "GFL.TOPK_CANDIDATES_TEST": params["nms_pre"],
            "GFL.NMS_THRESH_TEST": params["iou_threshold"],
        },
        maps=[x.new_zeros(len(x), 1, *x.shape[-2:]) for x in logits],
        test={"NMS": NMS[suppression], "DETECTIONS_PER_IMAGE": params["max_per_img"]},
    ).eval()
    assert_channels(model, {"logits": logits, "deltas": deltas})
    model.head.register_forward_hook(lambda *_: [logits, deltas])
    image = {"image": torch.zeros(3, height, width)}
    image.update(height=round(height / y_scale), width=round(width / x_scale))
    for index, output in enumerate(model([image] * len(logits[0]))):
        found = output["instances"]
        detections = torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1)
        assert_recorded(case, f"out_dets{index}", detections)
        assert_recorded(case, f"out_labels{index}", found.pred_classes)


CHECKS = {
    "anchors": check_anchors,
    "distance_coder": check_distance_coder,
    "head_forward": check_head_forward,
    "inference": check_inference,
    "integral": check_integral,
}
