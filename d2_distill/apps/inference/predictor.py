"""A trained detector for single pictures, as a user has them: an array in, detections in its own pixels out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ...data.augmentation import build_augmentation
from ...data.classes import dataset_classes
from ...engine.evaluate import load_detector
from ...errors import UserError
from ...layers.memory_format import in_fast_layout


class Predictor:
    """Detections of one image at a time, prepared as an evaluation prepares it.

    Detectron2's ``DefaultPredictor`` builds what ``MODEL.META_ARCHITECTURE`` names, a teacher included, and loads
    weights that fit in part.

    Args:
        model: detector with its weights; it is put in eval mode.
        resize: augmentations of evaluation.
        input_format: channel order that the model reads, "BGR" or "RGB".
        class_names: empty if they are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        resize: Sequence[T.Augmentation],
        input_format: str,
        class_names: Sequence[str] = (),
    ) -> None:
        if input_format not in ("BGR", "RGB"):
            raise UserError(f"INPUT.FORMAT is {input_format!r}; pictures can be given to a model as BGR or RGB.")
        self.model = in_fast_layout(model.eval())
        self.resize = T.AugmentationList(list(resize))
        self.input_format = input_format
        self.class_names = list(class_names)

    @classmethod
    def from_config(cls, cfg: CfgNode, *, weights_key: str = "MODEL.WEIGHTS") -> "Predictor":
        """The plain detector of a config with ``MODEL.WEIGHTS``; of a distillation's config the student.

        Args:
            weights_key: what error messages call the weights.

        Raises:
            UserError: the weights are missing or do not fit exactly, or the config is not usable.
        """
        return cls(
            load_detector(cfg, weights_key=weights_key),
            resize=build_augmentation(cfg, is_train=False),
            input_format=cfg.INPUT.FORMAT,
            class_names=dataset_classes(cfg),
        )

    def __call__(self, image: np.ndarray) -> Instances:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            ``pred_boxes`` in pixels of ``image``, ``scores`` and ``pred_classes``, on the CPU.
        """
        ordered = image[:, :, ::-1] if self.input_format == "BGR" else image
        resized = T.AugInput(ordered)
        self.resize(resized)
        tensor = torch.from_numpy(np.array(resized.image.transpose(2, 0, 1), order="C"))
        height, width = image.shape[:2]
        with torch.no_grad():
            [output] = self.model([{"image": tensor, "height": height, "width": width}])
        return output["instances"].to("cpu")
