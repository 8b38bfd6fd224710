"""``torchvision://resnet50`` or ``torchvision://resnet50/IMAGENET1K_V1``: which file of torchvision's that is."""

from __future__ import annotations

import difflib
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlparse

import torch
import torchvision
from detectron2.utils import comm
from torchvision.models import WeightsEnum

from ...errors import UserError
from .layouts import RULES, shapes_of

PREFIX = "torchvision://"
# ImageNet's, of RGB images of 0 to 255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class TorchvisionWeights:
    """
    Attributes:
        model: torchvision's name of the model.
        entry: its weights.
    """

    model: str
    entry: WeightsEnum

    @classmethod
    def of(cls, address: str) -> TorchvisionWeights:
        """Parse ``torchvision://<model>``, which means torchvision's default weights, or ``.../<model>/<weights>``.

        Raises:
            UserError: torchvision has no such model or weights, or no backbone fits the model.
        """
        model, _, entry = address[len(PREFIX) :].partition("/")
        if model not in torchvision.models.list_models():
            raise UserError(f"MODEL.WEIGHTS: torchvision has no model {model!r}; {_suggestion(model)}.")
        if model not in RULES:
            raise UserError(
                f"MODEL.WEIGHTS: no backbone can start from torchvision's {model}; use one of {', '.join(RULES)}."
            )
        entries = torchvision.models.get_model_weights(model)
        if entry and entry not in entries.__members__:
            raise UserError(
                f"MODEL.WEIGHTS: torchvision's {model} has no weights {entry!r}; use one of "
                f"{', '.join(entries.__members__)}, or {PREFIX}{model} for its default."
            )
        return cls(model, entries[entry or "DEFAULT"])

    @property
    def file_name(self) -> str:
        return posixpath.basename(urlparse(self.entry.url).path)

    @property
    def path(self) -> str:
        """Where torch keeps the file, below ``$TORCH_HOME``."""
        return os.path.join(torch.hub.get_dir(), "checkpoints", self.file_name)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Of the RGB images of 0 to 255 with which all of them were trained."""
        return PIXEL_MEAN

    @property
    def pixel_std(self) -> tuple[float, ...]:
        return PIXEL_STD

    def __str__(self) -> str:
        return f"torchvision's {self.model} ({self.entry.name})"

    def has_bottlenecks(self) -> bool:
        """Whether it is a ResNet of blocks of three convolutions, with the stride in the second."""
        return "layer1.0.conv3.weight" in self.shapes()

    def shapes(self) -> Mapping[str, torch.Size]:
        """Return the shapes of the tensors, by torchvision's names; the file is not read."""
        return shapes_of(self.model)

    def read(self) -> dict[str, torch.Tensor]:
        """Return the state dict, by torchvision's names; the file is downloaded if torch does not have it yet.

        Raises:
            UserError: it cannot be downloaded, or the file that torch has cannot be read.
        """
        is_there = os.path.exists(self.path)
        try:
            return self.entry.get_state_dict(
                map_location="cpu", progress=comm.is_main_process(), check_hash=True, weights_only=True
            )
        except Exception as error:  # whatever the network, the disk, the check of the hash or unpickling raises
            reason = " ".join(str(getattr(error, "reason", error)).split()).partition(". ")[0].rstrip(".")
            if is_there:
                raise UserError(
                    f"MODEL.WEIGHTS: {self.path} cannot be read as the weights of {self} ({reason}); remove it to "
                    "download it again."
                ) from error
            raise UserError(
                f"MODEL.WEIGHTS: {self.file_name}, the weights of {self}, cannot be downloaded ({reason}); download "
                f"{self.entry.url} elsewhere and put it into {os.path.dirname(self.path)}."
            ) from error


def _suggestion(model: str) -> str:
    """Return what to use in the place of a name that torchvision does not know."""
    similar = difflib.get_close_matches(model.lower(), RULES, n=1)
    return f"did you mean {PREFIX}{similar[0]}" if similar else f"use one of {', '.join(RULES)}"
