"""Non-maximum suppression and VOC evaluation of the published localisation distillation code."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import Boxes, Instances

from d2_distill.evaluation import voc

from ...embedded.detection_data import registered, write_voc
from ..cases import Case
from ..dispatch import assert_close, assert_recorded
from ..openmmlab import build_given
from .ld_detectors import NMS


def check_nms(case: Case) -> None:
    """Of a detector with a row of cells, one a box, that predicts the recorded boxes and scores as they are."""
    params, boxes = case.data["params"], case.tensor("in_boxes")
    scores = case.tensor("in_scores")[:, :-1]  # the last column is the background
    rows, num_classes = scores.shape
    maps = [torch.zeros(1, 1, 1, rows)]
    model = build_given(
        "GFL",
        [1],
        {
            "GFL.NUM_CLASSES": num_classes,
            "GFL.SCORE_THRESH_TEST": params["score_thr"],
            "GFL.NMS_THRESH_TEST": params["iou_threshold"],
        },
        maps=maps,
        test={"NMS": NMS[params["type"]], "DETECTIONS_PER_IMAGE": params["max_num"]},
    ).eval()
    model.class_scores = lambda outputs: outputs["logits"]
    model.box_coder = SimpleNamespace(decode=lambda outputs, anchors, strides: outputs)
    model.head.register_forward_hook(lambda *_: [[x.t()[None, :, None]] for x in (scores, boxes)])
    side = int(boxes.max().ceil())
    (output,) = model([{"image": torch.zeros(3, side, side)}])
    found = output["instances"]
    assert_recorded(case, "out_dets", torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1))
    assert_recorded(case, "out_labels", found.pred_classes)


def check_voc_eval(case: Case) -> None:
    arrays, params = case.arrays, case.data["params"]
    convention = dataclasses.replace(voc.CONVENTIONS["openmmlab"], thresholds=tuple(params["iou_thresholds"]))
    aps = {2007: [], 2012: []}
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
        curves = voc.recall_and_precision(detections, objects, convention)
        for year, values in aps.items():
            values.append(voc.average_precision(*curves, eleven_points=year == 2007))
    assert_recorded(case, "out_per_class_11point", np.stack(aps[2007], axis=1))
    for year, key in ((2007, "out_map_11point"), (2012, "out_map_area")):
        with mock.patch.dict(voc.CONVENTIONS, {"recorded": convention}):
            results = evaluate(case, year)
        means = [results[f"AP{percent}"] / 100 for percent in voc.PERCENTS]
        assert_recorded(case, key, means[: len(convention.thresholds)])
        by_class = [results[f"AP-{index}"] / 100 for index in range(params["num_classes"])]
        np.testing.assert_allclose(by_class, np.stack(aps[year]).mean(axis=1))
        if year == 2007:
            assert_close(case, "AP", results["AP"] / 100, case.tensor("out_ap_11point"))


def evaluate(case: Case, year: int) -> dict[str, float]:
    """What the evaluator says of the recorded detections; it reads the ground truth from files."""
    arrays, params = case.arrays, case.data["params"]
    folder = case.scratch / str(year)
    ids = [str(image) for image in range(params["num_images"])]
    names = [str(index) for index in range(params["num_classes"])]
    columns = (arrays[f"in_gt_{what}"].tolist() for what in ("image", "labels", "boxes", "difficult"))
    objects = [(ids[image], names[label], box, difficult) for image, label, box, difficult in zip(*columns)]
    write_voc(folder, "test", ids, (1, 1), objects)
    with registered("golden_voc", register_pascal_voc, str(folder), "test", year, names):
        evaluator = voc.VOCEvaluator("golden_voc", "recorded")
        for image, image_id in enumerate(ids):
            rows = torch.from_numpy(arrays["in_det_image"] == image)
            table = case.tensor("in_det")[rows].double()
            boxes = Boxes(table[:, :4])
            boxes.tensor = table[:, :4] - torch.tensor([1.0, 1.0, 0.0, 0.0])  # as the data set's loader does
            output = Instances(
                (1, 1), pred_boxes=boxes, scores=table[:, 4], pred_classes=case.tensor("in_det_labels")[rows]
            )
            evaluator.process([{"image_id": image_id}], [{"instances": output}])
        return evaluator.evaluate()["bbox"]


CHECKS = {"nms": check_nms, "voc_eval": check_voc_eval}
