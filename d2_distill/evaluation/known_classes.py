"""Detections of classes that a data set does not have."""

from __future__ import annotations

from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..config.class_names import listed
from ..errors import UserError


class KnownClasses(DatasetEvaluator):
    """Another evaluator, which is given only classes that the data set has.

    Args:
        evaluator: what evaluates.
        dataset_name: the registered data set that it evaluates on.
    """

    def __init__(self, evaluator: DatasetEvaluator, dataset_name: str) -> None:
        self._evaluator = evaluator
        self._dataset_name = dataset_name

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Raises:
            UserError: the detector predicts more classes than there are.
        """
        names = MetadataCatalog.get(self._dataset_name).thing_classes
        highest = max((int(x["instances"].pred_classes.max()) for x in outputs if len(x["instances"])), default=0)
        if highest >= len(names):
            raise UserError(
                f"The detector predicts class {highest}, but the data set {self._dataset_name!r} has only the "
                f"{len(names)} classes {listed(names)}, counted from 0; set the detector's number of classes in its config."
            )
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> Any:
        return self._evaluator.evaluate()
