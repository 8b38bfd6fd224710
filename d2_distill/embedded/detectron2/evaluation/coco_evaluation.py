"""COCOEvaluator: COCO box AP, computed by faster-coco-eval where it is installed, else by pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from .evaluator import DatasetEvaluator

# metric -> (index of the IoU threshold in 0.50:0.05:0.95 or all, index of the area range)
_METRICS = {
    "AP": (slice(None), 0),
    "AP50": (0, 0),
    "AP75": (5, 0),
    "APs": (slice(None), 1),
    "APm": (slice(None), 2),
    "APl": (slice(None), 3),
}


class COCOEvaluator(DatasetEvaluator):
    """Box AP as the COCO server computes it, in percent, also per class ("AP-<class>", if there are several).

    Args:
        dataset_name: registered with ``register_coco_instances``.
        output_dir: where instances_predictions.pth and coco_instances_results.json are written, if given.
        max_dets_per_image: how many detections of an image count, by default COCO's 100.
    """

    def __init__(self, dataset_name: str, *, output_dir: str | None = None, max_dets_per_image: int | None = None):
        self._max_dets = [1, 10, 100 if max_dets_per_image is None else max_dets_per_image]
        self._logger = logging.getLogger(__name__)
        self._output_dir = output_dir
        self._metadata = MetadataCatalog.get(dataset_name)
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco = COCO(PathManager.get_local_path(self._metadata.json_file))
        self._predictions: list[dict[str, Any]] = []

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the ``image_id`` of each input and the ``instances`` of each output."""
        for given, output in zip(inputs, outputs):
            instances = output["instances"].to(torch.device("cpu"))
            records = instances_to_coco_json(instances, given["image_id"])
            self._predictions.append({"image_id": given["image_id"], "instances": records})

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bbox": {metric: value}}.

        {} if nothing was processed, nothing is annotated, or this is not the main process.
        """
        predictions = list(itertools.chain.from_iterable(comm.gather(self._predictions)))
        if not predictions:
            if comm.is_main_process():
                self._logger.warning("There is nothing to evaluate: no image was processed.")
            return {}
        records = itertools.chain.from_iterable(prediction["instances"] for prediction in predictions)
        detections = self._with_category_ids(records)
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "instances_predictions.pth"), "wb") as f:
                torch.save(predictions, f)
            with PathManager.open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as f:
                json.dump(detections, f)
            self._logger.info(f"The detections are kept in {self._output_dir}")
        if "annotations" not in self._coco.dataset:
            self._logger.info("There are no annotations to evaluate against.")
            return {}
        return {"bbox": self._metrics(detections)}

    def _with_category_ids(self, records) -> list[dict[str, Any]]:
        """Copies of the records, with contiguous classes turned back to the ids of the annotation file."""
        id_map = self._metadata.thing_dataset_id_to_contiguous_id
        original = {index: category_id for category_id, index in id_map.items()}
        detections = []
        for record in records:
            index = record["category_id"]
            assert index in original, f"A prediction has class {index}; the data set has {len(original)}."
            detections.append({**record, "category_id": original[index]})
        return detections

    def _metrics(self, detections: list[dict[str, Any]]) -> dict[str, float]:
        if not detections:
            self._logger.warning("The model detected nothing in any image.")
            return {metric: float("nan") for metric in _METRICS}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._eval_class()(self._coco, self._coco.loadRes(detections), "bbox")
            evaluation.params.maxDets = self._max_dets
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU threshold, recall, class, area range, maximum number of detections)
        precision = evaluation.eval["precision"]

        results = OrderedDict(
            (metric, _percent(precision[iou, ..., area, -1])) for metric, (iou, area) in _METRICS.items()
        )
        self._logger.info("Box AP:\n" + _table(results, len(results)))
        class_names = self._metadata.thing_classes
        if len(class_names) > 1:
            per_class = {name: _percent(precision[:, :, k, 0, -1]) for k, name in enumerate(class_names)}
            self._logger.info("Box AP of each class:\n" + _table(per_class, 3))
            results.update({f"AP-{name}": value for name, value in per_class.items()})
        return results

    def _eval_class(self):
        # faster-coco-eval takes only numbers as image ids
        if all(isinstance(image_id, int) for image_id in self._coco.imgs):
            with contextlib.suppress(ImportError):
                from faster_coco_eval import COCOeval_faster

                return COCOeval_faster
        return COCOeval


def instances_to_coco_json(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """Detections (pred_boxes, scores, pred_classes, on the CPU) of an image as COCO result records."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(instances.pred_classes.tolist(), boxes, instances.scores.tolist())
    ]


def _percent(precision: np.ndarray) -> float:
    """Mean of what is defined (COCO marks undefined entries with -1), in percent; NaN if nothing is."""
    defined = precision[precision > -1]
    return float(np.mean(defined) * 100) if defined.size else float("nan")


def _table(values: dict[str, float], pairs: int) -> str:
    """Names and values, so many pairs a line."""
    cells = list(itertools.chain.from_iterable(values.items()))
    rows = [cells[i : i + 2 * pairs] for i in range(0, len(cells), 2 * pairs)]
    return tabulate(rows, tablefmt="plain", floatfmt=".3f")
