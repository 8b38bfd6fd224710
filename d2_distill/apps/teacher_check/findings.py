"""What a detector finds of the objects of a data set: recall, sure and unsure finds, images without any."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances

from ...evaluation.matching import match_detections
from ...evaluation.voc import average_precision
from ..pictures import ground_truth


@dataclass(frozen=True)
class ImageFindings:
    """Of one image, for D detections and G objects, crowds left out.

    Attributes:
        scores, classes, right: (D,) each; right is a detection on an object of its class that no surer one is on.
        object_classes, missed: (G,) each.
    """

    scores: torch.Tensor
    classes: torch.Tensor
    right: torch.Tensor
    object_classes: torch.Tensor
    missed: torch.Tensor


class Findings(DatasetEvaluator):
    """Compares the detections of each image with its objects at an IoU of 0.5.

    Args:
        records: of the data set, in Detectron2's standard form.
        num_classes: of the data set.
    """

    def __init__(self, records: Sequence[dict[str, Any]], num_classes: int) -> None:
        self._records = {record["image_id"]: record for record in records}
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        self._images: dict[Any, ImageFindings] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the ``image_id`` of each input and the ``instances`` of each output."""
        for given, output in zip(inputs, outputs):
            truth = ground_truth(self._records[given["image_id"]])
            found: Instances = output["instances"].to("cpu")
            match = match_detections(found, truth)
            self._images[given["image_id"]] = ImageFindings(
                found.scores, found.pred_classes, match.right, truth.gt_classes, match.missed
            )

    def evaluate(self) -> dict[str, Any]:
        """{}: the results are the methods' below."""
        return {}

    def objects(self) -> list[int]:
        """Number of objects of each class."""
        return torch.bincount(self._of("object_classes").long(), minlength=self.num_classes).tolist()

    def found(self) -> list[int]:
        """Number of objects of each class that a detection of any score is on."""
        classes = self._of("object_classes").long()[~self._of("missed").bool()]
        return torch.bincount(classes, minlength=self.num_classes).tolist()

    def mean_score(self, index: int | None = None) -> float:
        """Of the right detections of a class, or of all; nan without any."""
        right = self._of("right").bool()
        if index is not None:
            right = right & (self._of("classes") == index)
        return self._of("scores")[right].mean().item()

    def precision(self, score: float) -> float:
        """Share of right ones among the detections of at least this score; nan without any."""
        return self._of("right")[self._of("scores") >= score].float().mean().item()

    def ap50(self, image_ids: Container | None = None) -> float:
        """Mean over the classes that have objects of the area below the precision-recall curve, in percent."""
        objects = torch.bincount(self._of("object_classes", image_ids).long(), minlength=self.num_classes)
        scores, classes, right = (self._of(name, image_ids) for name in ("scores", "classes", "right"))
        order = scores.argsort(descending=True, stable=True)
        aps = []
        for index in objects.nonzero().flatten().tolist():
            hits = right[order][classes[order] == index].numpy()
            found = hits.cumsum()
            recall, precision = found / objects[index].item(), found / np.arange(1, len(found) + 1)
            aps.append(average_precision(recall[None], precision[None], eleven_points=False).item())
        return 100 * float(np.mean(aps)) if aps else float("nan")

    def images(self) -> int:
        """Number of images that have objects."""
        return sum(len(image.missed) > 0 for image in self._images.values())

    def without_any(self) -> list[str]:
        """Files of the images of whose objects none is found."""
        return [
            self._records[image_id]["file_name"]
            for image_id, image in self._images.items() if len(image.missed) and image.missed.all()
        ]

    def _of(self, name: str, image_ids: Container | None = None) -> torch.Tensor:
        images = [image for key, image in self._images.items() if image_ids is None or key in image_ids]
        return torch.cat([getattr(image, name) for image in images]) if images else torch.zeros(0)
