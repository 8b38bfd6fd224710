"""Average precision of Pascal VOC data sets, by the rules of the development kit or of OpenMMLab."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..data.loaded import LoadedOnce
from ..errors import UserError

logger = logging.getLogger(__name__)

PERCENTS = tuple(range(50, 100, 5))  # names of the ten IoU thresholds: AP50 .. AP95


@dataclass(frozen=True)
class Convention:
    """How boxes are compared, and over which classes the mean is taken.

    Attributes:
        thresholds: the ten IoUs.
        extent: added to the sides of a box; 1 if corners are indices of pixels that belong to it.
        inclusive: whether an IoU that equals the threshold is a match.
        decimals: of scores and of boxes, to which detections are rounded; None: not at all.
        empty_classes: whether classes without objects (difficult ones do not count) are part of the mean.
    """

    thresholds: tuple[float, ...]
    extent: float
    inclusive: bool
    decimals: tuple[int, int] | None
    empty_classes: bool


CONVENTIONS = {
    # The numbers of Detectron2's PascalVOCDetectionEvaluator, rounded like the files that the kit reads.
    "devkit": Convention(
        thresholds=tuple(percent / 100 for percent in PERCENTS),
        extent=1.0,
        inclusive=False,
        decimals=(3, 1),
        empty_classes=True,
    ),
    # Those in which localisation distillation was published; its thresholds are summed up from 0.05.
    "openmmlab": Convention(
        thresholds=tuple(np.cumsum([0.5] + 9 * [0.05]).tolist()),
        extent=0.0,
        inclusive=True,
        decimals=None,
        empty_classes=False,
    ),
}


def voc_convention(name: str) -> Convention:
    """The convention that ``TEST.VOC_CONVENTION`` names.

    Raises:
        UserError: there is none of this name.
    """
    if name not in CONVENTIONS:
        raise UserError(f"TEST.VOC_CONVENTION is {name!r}; choose one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


class Detections(NamedTuple):
    """Detections of one class: (D,) numbers of their images, (D, 4) XYXY boxes, (D,) scores."""

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


class Objects(NamedTuple):
    """Ground truth of one class: (G,) numbers of the images, (G, 4) XYXY boxes, (G,) whether difficult."""

    images: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray


def best_objects(detections: Detections, objects: Objects, *, extent: float) -> tuple[np.ndarray, np.ndarray]:
    """(D,) object of the same image that each detection overlaps most, and (D,) the IoU; -1 and 0 if none."""
    best = np.full(len(detections.images), -1)
    ious = np.zeros(len(detections.images))
    by_image = np.argsort(detections.images, kind="stable")
    images = np.unique(objects.images)
    starts, stops = (
        np.searchsorted(detections.images[by_image], images, side=side) for side in ("left", "right")
    )
    for image, start, stop in zip(images, starts, stops):
        rows, columns = by_image[start:stop], np.flatnonzero(objects.images == image)
        overlaps = _pairwise_iou(detections.boxes[rows], objects.boxes[columns], extent)
        best[rows], ious[rows] = columns[overlaps.argmax(axis=1)], overlaps.max(axis=1)
    return best, ious


def _pairwise_iou(boxes1: np.ndarray, boxes2: np.ndarray, extent: float) -> np.ndarray:
    def area(top_left: np.ndarray, bottom_right: np.ndarray) -> np.ndarray:
        return (bottom_right - top_left + extent).clip(min=0).prod(axis=-1)

    boxes1 = boxes1[:, None]
    intersection = area(
        np.maximum(boxes1[..., :2], boxes2[..., :2]), np.minimum(boxes1[..., 2:], boxes2[..., 2:])
    )
    union = area(boxes1[..., :2], boxes1[..., 2:]) + area(boxes2[..., :2], boxes2[..., 2:]) - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).eps)


def recall_and_precision(
    detections: Detections, objects: Objects, convention: Convention
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of one class after each detection, best score first, at T thresholds.

    A detection may only match the object that it overlaps most. The first to do so with a sufficient IoU is
    right; it counts neither way if the object is difficult; all others are wrong. Detections of equal score
    keep their order; the real Detectron2 leaves that to an unstable sort, which moves AP by some hundredths.

    Returns:
        (T, D) each; the recall is nan if there is no object that is not difficult.
    """
    order = np.argsort(-detections.scores, kind="stable")
    detections = Detections(*(values[order] for values in detections))
    best, ious = best_objects(detections, objects, extent=convention.extent)
    thresholds = np.asarray(convention.thresholds)[:, None]
    matches = (ious >= thresholds if convention.inclusive else ious > thresholds) & (best >= 0)
    ignored = np.append(objects.difficult, False)[best]  # the appended one is that of best == -1
    rows, columns = np.nonzero(matches & ~ignored)
    _, first = np.unique(rows * len(objects.images) + best[columns], return_index=True)
    true_positive = np.zeros(matches.shape, dtype=bool)
    true_positive[rows[first], columns[first]] = True
    false_positive = ~true_positive & ~(matches & ignored)
    found, wrong = true_positive.cumsum(axis=1), false_positive.cumsum(axis=1)
    with np.errstate(invalid="ignore"):
        recall = found / np.float64((~objects.difficult).sum())
    return recall, found / np.maximum(found + wrong, 1)


def average_precision(recall: np.ndarray, precision: np.ndarray, *, eleven_points: bool) -> np.ndarray:
    """(T,) AP of recall-precision curves (T, D).

    Args:
        eleven_points: the mean of the best precision at recalls of at least 0, 0.1 .. 1 (VOC 2007), instead
            of the area under the curve's envelope (VOC 2012).
    """
    if eleven_points:
        points = [
            np.where(recall >= point, precision, 0).max(axis=1, initial=0) for point in np.arange(0, 1.1, 0.1)
        ]
        return np.mean(points, axis=0)
    ends = np.zeros((len(recall), 1))
    recall = np.hstack([ends, recall, ends + 1])
    envelope = np.maximum.accumulate(np.hstack([precision, ends])[:, ::-1], axis=1)[:, ::-1]
    return (np.diff(recall, axis=1) * envelope).sum(axis=1)


_Row = tuple[int, list[float], bool]  # number of the image, corners as written, whether difficult


def read_objects(dirname: str, split: str, class_names: Sequence[str]) -> tuple[list[str], list[Objects]]:
    """The image ids of a split of a Pascal VOC folder, and the objects of each class as written in the files.

    An object's ``images`` number the ids.
    """
    with PathManager.open(os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")) as file:
        image_ids = [line.split()[0] for line in file if line.strip()]
    rows: list[list[_Row]] = [[] for _ in class_names]
    for number, image_id in enumerate(image_ids):
        with PathManager.open(os.path.join(dirname, "Annotations", f"{image_id}.xml")) as file:
            tree = ElementTree.parse(file)
        for item in tree.findall("object"):
            box = [float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            difficult = item.findtext("difficult", "0").strip() == "1"
            rows[class_names.index(item.findtext("name"))].append((number, box, difficult))
    return image_ids, [_objects(each) for each in rows]


def objects_of_records(records: Sequence[dict[str, Any]], num_classes: int) -> tuple[list[str], list[Objects]]:
    """Return the same as :func:`read_objects` of records that :func:`.voc_files.read_voc` has read."""
    rows: list[list[_Row]] = [[] for _ in range(num_classes)]
    for number, record in enumerate(records):
        for annotation in record["annotations"]:
            xmin, ymin, xmax, ymax = annotation["bbox"]
            row = (number, [xmin + 1, ymin + 1, xmax, ymax], annotation["difficult"])
            rows[annotation["category_id"]].append(row)
    return [record["image_id"] for record in records], [_objects(each) for each in rows]


def _objects(rows: Sequence[_Row]) -> Objects:
    return Objects(
        images=np.array([number for number, _, _ in rows], dtype=np.int64),
        boxes=np.array([box for _, box, _ in rows], dtype=np.float64).reshape(-1, 4),
        difficult=np.array([difficult for _, _, difficult in rows], dtype=bool),
    )


class VOCEvaluator(DatasetEvaluator):
    """Mean AP over the classes, in percent: AP (of ten IoU thresholds), AP50, AP75 and all of AP50 .. AP95.

    The data set's year decides between 11 points (2007) and area. In both conventions predictions get the 1
    back that Detectron2's loader took from xmin and ymin, so that they compare with the files as written. These are read
    only where the data set's records do not tell which objects are difficult; those of ``DATASETS.VOC`` do.

    Args:
        dataset_name: registered with ``register_pascal_voc``.
        convention: "devkit" or "openmmlab".
    """

    def __init__(self, dataset_name: str, convention: str = "devkit") -> None:
        self._dataset_name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._convention_name = convention
        self._convention = voc_convention(convention)
        self.reset()

    def reset(self) -> None:
        # Image id, boxes, scores and classes of each image.
        self._predictions: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the ``image_id`` of each input and the ``instances`` of each output."""
        for given, output in zip(inputs, outputs):
            instances = output["instances"].to(torch.device("cpu"))
            boxes = instances.pred_boxes.tensor.double().numpy() + [1.0, 1.0, 0.0, 0.0]
            scores = instances.scores.double().numpy()
            if self._convention.decimals is not None:
                score_decimals, box_decimals = self._convention.decimals
                scores, boxes = _rounded(scores, score_decimals), _rounded(boxes, box_decimals)
            self._predictions.append((given["image_id"], boxes, scores, instances.pred_classes.numpy()))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"bbox": {"AP", "AP50", "AP75", "AP55" .. "AP95", "AP-<class>" ..}}; None in other than the main process.

        {} if no image was processed.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        predictions = [prediction for part in gathered for prediction in part]
        if not predictions:
            logger.warning("There is nothing to evaluate: no image was processed.")
            return {}
        metadata = self._metadata
        entry = DatasetCatalog[self._dataset_name]
        records = entry() if isinstance(entry, LoadedOnce) else None
        if records and all("difficult" in annotation for record in records for annotation in record["annotations"]):
            image_ids, objects = objects_of_records(records, len(metadata.thing_classes))
        else:
            image_ids, objects = read_objects(metadata.dirname, metadata.split, metadata.thing_classes)
        numbers = {image_id: number for number, image_id in enumerate(image_ids)}
        images = np.repeat([numbers[x[0]] for x in predictions], [len(x[1]) for x in predictions])
        boxes, scores, classes = (np.concatenate([x[i] for x in predictions]) for i in (1, 2, 3))
        aps = np.stack([
            average_precision(
                *recall_and_precision(
                    Detections(*(values[classes == index] for values in (images, boxes, scores))),
                    of_class,
                    self._convention,
                ),
                eleven_points=metadata.year == 2007,
            )
            for index, of_class in enumerate(objects)
        ])
        return {"bbox": self._summary(100 * aps, np.array([not x.difficult.all() for x in objects]))}

    def _summary(self, aps: np.ndarray, has_objects: np.ndarray) -> dict[str, float]:
        """Log AP50 of the classes and the mean at each threshold; ``aps`` is (classes, thresholds)."""
        counted = aps if self._convention.empty_classes else aps[has_objects]
        means = counted.mean(axis=0) if len(counted) else np.full(len(PERCENTS), np.nan)
        by_threshold = {f"AP{percent}": float(mean) for percent, mean in zip(PERCENTS, means)}
        results = OrderedDict(AP=float(means.mean()), AP50=by_threshold["AP50"], AP75=by_threshold["AP75"])
        results.update(by_threshold)
        logger.info(
            "Box AP by the rules of VOC %d in the convention %r:\n%s",
            self._metadata.year,
            self._convention_name,
            tabulate([by_threshold.values()], by_threshold, floatfmt=".3f"),
        )
        classes = self._metadata.thing_classes
        # as COCO's, means of the thresholds; of a class without objects only where it is part of the mean
        results.update({
            f"AP-{name}": float(row.mean()) if present or self._convention.empty_classes else np.nan
            for name, row, present in zip(classes, aps, has_objects)
        })
        rows = zip(classes, aps[:, 0])
        logger.info("AP50 of each class:\n%s", tabulate(rows, ("class", "AP50"), floatfmt=".3f"))
        return results


def _rounded(values: np.ndarray, decimals: int) -> np.ndarray:
    """As printing rounds, by the exact binary value; numpy's own rounding differs by chance at .05."""
    rounded = [round(value, decimals) for value in values.ravel().tolist()]
    return np.array(rounded, dtype=np.float64).reshape(values.shape)
