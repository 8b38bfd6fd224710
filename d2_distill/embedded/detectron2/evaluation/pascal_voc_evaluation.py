"""PascalVOCDetectionEvaluator: the AP of the Pascal VOC development kit, for VOC 2007 or 2012 data."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, defaultdict

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.pascal_voc import read_annotation, read_image_ids
from detectron2.utils import comm

from .evaluator import DatasetEvaluator

# a detection as the development kit reads it: image, score, box (1-based, both ends included)
_Detection = tuple[str, float, list[float]]
# ground truth of a class in an image: boxes (N, 4), difficult (N,)
_GroundTruth = dict[str, tuple[np.ndarray, np.ndarray]]


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """Mean AP over classes, in percent: AP (over IoU 0.50:0.05:0.95), AP50, AP75.

    The protocol's conventions: pixel-index boxes (widths count both ends), a match needs an IoU above the
    threshold, difficult objects count neither way, and AP is the 11-point one for 2007, the area under the
    precision envelope for 2012. Scores and boxes are rounded like in the kit's text files (3 and 1 decimals).

    Args:
        dataset_name: registered with ``register_pascal_voc``.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        assert metadata.year in (2007, 2012), f"VOC year {metadata.year} is neither 2007 nor 2012."
        self._dirname, self._split = metadata.dirname, metadata.split
        self._class_names = metadata.thing_classes
        self._use_07_metric = metadata.year == 2007
        self.reset()

    def reset(self) -> None:
        self._detections: dict[int, list[_Detection]] = defaultdict(list)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the ``image_id`` of each input and the ``instances`` of each output."""
        for given, output in zip(inputs, outputs):
            instances = output["instances"].to(torch.device("cpu"))
            boxes = instances.pred_boxes.tensor.tolist()
            scores, classes = instances.scores.tolist(), instances.pred_classes.tolist()
            for (x0, y0, x1, y1), score, class_index in zip(boxes, scores, classes):
                box = [round(value, 1) for value in (x0 + 1, y0 + 1, x1, y1)]
                self._detections[class_index].append((given["image_id"], round(score, 3), box))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bbox": {"AP", "AP50", "AP75"}}; None in processes other than the main one."""
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return None
        year = 2007 if self._use_07_metric else 2012
        logging.getLogger(__name__).info(f"Box AP by the rules of VOC {year}")
        ground_truth = self._read_ground_truth()
        aps: dict[int, list[float]] = defaultdict(list)  # IoU threshold in percent -> AP of each class
        for index, name in enumerate(self._class_names):
            detections = list(itertools.chain.from_iterable(part.get(index, []) for part in gathered))
            for threshold in range(50, 100, 5):
                recall, precision = _recall_precision(detections, ground_truth[name], threshold / 100.0)
                aps[threshold].append(100 * _average_precision(recall, precision, self._use_07_metric))
        mean = {threshold: float(np.mean(values)) for threshold, values in aps.items()}
        return {"bbox": OrderedDict(AP=float(np.mean(list(mean.values()))), AP50=mean[50], AP75=mean[75])}

    def _read_ground_truth(self) -> dict[str, _GroundTruth]:
        """Class name -> image -> (boxes, difficult), over the images of the split."""
        ground_truth: dict[str, _GroundTruth] = {name: {} for name in self._class_names}
        for image_id in read_image_ids(self._dirname, self._split):
            _, objects = read_annotation(self._dirname, image_id)
            for name in {name for name, _, _ in objects} & ground_truth.keys():
                boxes, difficult = zip(*((box, hard) for other, box, hard in objects if other == name))
                ground_truth[name][image_id] = np.array(boxes), np.array(difficult)
        return ground_truth


def _recall_precision(
    detections: list[_Detection], ground_truth: _GroundTruth, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection, in descending order of score.

    A detection belongs to the object of its image that it overlaps most. It is right if it is the first to do
    so by more than the threshold, and not counted if that object is difficult.
    """
    num_objects = sum(int((~difficult).sum()) for _, difficult in ground_truth.values())
    found = {image_id: np.zeros(len(boxes), dtype=bool) for image_id, (boxes, _) in ground_truth.items()}
    # sorted() is stable: equal scores, frequent after rounding, keep the order of processing
    detections = sorted(detections, key=lambda detection: -detection[1])
    true_positive, false_positive = np.zeros(len(detections)), np.zeros(len(detections))
    for i, (image_id, _, box) in enumerate(detections):
        best, best_iou = None, -np.inf
        if image_id in ground_truth:
            boxes, difficult = ground_truth[image_id]
            ious = _pixel_iou(np.asarray(box), boxes)
            best = int(np.argmax(ious))
            best_iou = ious[best]
        if best_iou <= threshold:
            false_positive[i] = 1
        elif not difficult[best]:
            (false_positive if found[image_id][best] else true_positive)[i] = 1
            found[image_id][best] = True
    true_positive, false_positive = np.cumsum(true_positive), np.cumsum(false_positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = true_positive / float(num_objects)
    precision = true_positive / np.maximum(true_positive + false_positive, np.finfo(np.float64).eps)
    return recall, precision


def _pixel_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box (4,) with boxes (N, 4) whose corners are pixel indices, the last ones included."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]) + 1.0
    intersection = np.prod(np.maximum(sides, 0.0), axis=1)
    area = np.prod(box[2:] - box[:2] + 1.0)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1.0, axis=1)
    return intersection / (area + areas - intersection)


def _average_precision(recall: np.ndarray, precision: np.ndarray, use_07_metric: bool) -> float:
    """AP of a recall-precision curve: mean of 11 points (VOC 2007), or the area under its envelope."""
    if use_07_metric:
        # the best precision at a recall of at least 0, 0.1 .. 1, or 0 where that is not reached
        points = [precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]
        return float(np.mean(points))
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([0.0], precision, [0.0]))[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[steps + 1] - recall[steps]) * envelope[steps + 1]))
