"""Non-maximum suppression and VOC evaluation of the published localisation distillation code."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torchvision.ops import batched_nms

from d2_distill.evaluation import voc
from d2_distill.postprocess import cluster_nms

from ..cases import Case
from ..dispatch import assert_recorded


def check_nms(case: Case) -> None:
    params = case.data["params"]
    class_scores = case.tensor("in_scores")[:, :-1]
    rows, classes = (class_scores > params["score_thr"]).nonzero(as_tuple=True)
    boxes, scores = case.tensor("in_boxes")[rows], class_scores[rows, classes]
    if params["type"] == "nms":
        keep = batched_nms(boxes, scores, classes, params["iou_threshold"])
        voted = boxes[keep]
    else:
        keep, voted = cluster_nms(
            boxes, scores, classes, params["iou_threshold"], overlap="diou", voting="score"
        )
    detections = torch.cat([voted, scores[keep, None]], dim=1)[: params["max_num"]]
    assert_recorded(case, "out_dets", detections)
    assert_recorded(case, "out_labels", classes[keep][: params["max_num"]])


def check_voc_eval(case: Case) -> None:
    arrays, params = case.arrays, case.data["params"]
    convention = dataclasses.replace(
        voc.CONVENTIONS["openmmlab"], thresholds=tuple(params["iou_thresholds"])
    )
    np.testing.assert_allclose(voc.CONVENTIONS["openmmlab"].thresholds, convention.thresholds)
    aps = {"11point": [], "area": []}
    for index in range(params["num_classes"]):
        found, true = arrays["in_det_labels"] == index, arrays["in_gt_labels"] == index
        detections = voc.Detections(
            arrays["in_det_image"][found], arrays["in_det"][found, :4], arrays["in_det"][found, 4]
        )
        objects = voc.Objects(
            arrays["in_gt_image"][true],
            arrays["in_gt_boxes"][true].astype(np.float32),
            arrays["in_gt_difficult"][true],
        )
        assert not objects.difficult.all()
        curves = voc.recall_and_precision(detections, objects, convention)
        for kind, values in aps.items():
            values.append(voc.average_precision(*curves, eleven_points=kind == "11point"))
    per_class = np.stack(aps["11point"], axis=1)
    assert_recorded(case, "out_per_class_11point", per_class)
    assert_recorded(case, "out_map_11point", per_class.mean(axis=1))
    assert_recorded(case, "out_map_area", np.stack(aps["area"]).mean(axis=0))
    assert_recorded(case, "out_ap_11point", per_class.mean())


CHECKS = {"nms": check_nms, "voc_eval": check_voc_eval}
