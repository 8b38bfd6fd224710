"""Test-time augmentation: a detector looks at several sizes of an image and its mirror image, and the boxes are merged."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from ..data.augmentation import at_least_a_pixel
from ..data.mapper import check_image_file
from ..errors import UserError

SUFFIX = "_TTA"  # as Detectron2 calls the results
_COPIES = "augmented"
_IOU = 0.5  # of detectors without an NMS of their own, between which there would be duplicates of each copy


def check_augmentation(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: ``TEST.AUG`` asks for what cannot be done.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise UserError(f"TEST.AUG.ENABLED merges boxes only, and MODEL.{key} is True; set one of them to False.")
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UserError(f"TEST.AUG.MIN_SIZES is {sizes!r}; write one or more positive numbers of pixels.")
    if cfg.TEST.AUG.MAX_SIZE <= 0:
        raise UserError(f"TEST.AUG.MAX_SIZE is {cfg.TEST.AUG.MAX_SIZE}; write a positive number of pixels.")


class AugmentedMapper:
    """Maps a record to the inputs of :class:`AugmentedDetector`: each of ``TEST.AUG.MIN_SIZES``, and its mirror image.

    Args:
        cfg: its ``TEST.AUG`` and ``INPUT.FORMAT`` are read.
    """

    def __init__(self, cfg: CfgNode) -> None:
        chosen = cfg.TEST.AUG
        self._format = cfg.INPUT.FORMAT
        self._flips = (False, True) if chosen.FLIP else (False,)
        self._resizes = [
            at_least_a_pixel(T.ResizeShortestEdge((size,), chosen.MAX_SIZE, "choice")) for size in chosen.MIN_SIZES
        ]

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        picture = check_image_file(record, self._format)
        facts = {key: value for key, value in record.items() if key != "annotations"}
        copies = []
        for resize in self._resizes:
            resized = T.AugInput(picture)
            resize(resized)
            for flips in self._flips:
                pixels = resized.image[:, ::-1] if flips else resized.image
                image = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
                copies.append({**facts, "image": image, "flipped": flips})
        return {**facts, _COPIES: copies}


class AugmentedDetector(nn.Module):
    """A detector whose boxes of several copies of each image are merged by its non-maximum suppression.

    Args:
        model: in eval mode; it returns boxes in pixels of the original image.
        max_detections: the most detections of an image, ``TEST.DETECTIONS_PER_IMAGE``; all if negative.
    """

    def __init__(self, model: nn.Module, *, max_detections: int) -> None:
        super().__init__()
        self.model = model
        self.max_detections = max_detections
        self.train(model.training)  # the mode that an evaluation restores
        own = (getattr(module, "test_nms_thresh", 0.0) for module in model.modules())
        self.iou_threshold = next((threshold for threshold in own if 0 < threshold < 1), _IOU)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: what :class:`AugmentedMapper` returns.

        Returns:
            For each image, its ``instances``.
        """
        return [{"instances": self._merged(inputs[_COPIES])} for inputs in batched_inputs]

    def _merged(self, copies: list[dict[str, Any]]) -> Instances:
        found = Instances.cat([self._detections(each) for each in copies])
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.iou_threshold)
        return found[keep if self.max_detections < 0 else keep[: self.max_detections]]

    def _detections(self, inputs: dict[str, Any]) -> Instances:
        [output] = self.model([inputs])
        if "instances" not in output:
            raise UserError("TEST.AUG.ENABLED needs a detector that predicts boxes; set it to False.")
        instances = output["instances"]
        boxes = instances.pred_boxes.tensor
        if inputs["flipped"]:
            width = instances.image_size[1]
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        return Instances(
            instances.image_size, pred_boxes=Boxes(boxes), scores=instances.scores, pred_classes=instances.pred_classes
        )


def evaluate_augmented(
    cfg: CfgNode,
    model: nn.Module,
    *,
    build_loader: Callable[[CfgNode, str, AugmentedMapper], DataLoader],
    build_evaluator: Callable[[CfgNode, str], DatasetEvaluator],
) -> dict[str, Any]:
    """Evaluate a detector with test-time augmentation on every data set of ``DATASETS.TEST``.

    Returns:
        What ``DefaultTrainer.test`` returns, but each name ends in ``_TTA``.
    """
    inner = getattr(model, "module", model)
    detector = AugmentedDetector(inner, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE)
    results: dict[str, Any] = OrderedDict()
    for name in cfg.DATASETS.TEST:
        loader = build_loader(cfg, name, AugmentedMapper(cfg))
        results[name] = inference_on_dataset(detector, loader, build_evaluator(cfg, name))
        if comm.is_main_process():
            print_csv_format({f"{task}{SUFFIX}": metrics for task, metrics in results[name].items()})
    of_sets = next(iter(results.values())) if len(results) == 1 else results
    return OrderedDict((f"{key}{SUFFIX}", value) for key, value in of_sets.items())
