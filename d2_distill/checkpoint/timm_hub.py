"""``timm://mobilenetv4_conv_small`` or ``timm://mobilenetv4_conv_small.e2400_r224_in1k``: a file of timm's hub."""

from __future__ import annotations

import difflib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..backbones.timm_trunk import import_timm
from ..errors import UserError

PREFIX = "timm://"


@dataclass(frozen=True)
class TimmWeights:
    """
    Attributes:
        model: timm's name of the model.
        tag: of its weights.
        repository, hub_file: where the hub has them.
        pixel_mean, pixel_std: of RGB images of 0 to 255, with which they were trained.
    """

    model: str
    tag: str
    repository: str
    hub_file: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    @classmethod
    def of(cls, address: str) -> TimmWeights:
        """Parse ``timm://<model>``, which means timm's default weights, or ``timm://<model>.<tag>``.

        Raises:
            UserError: timm is missing, or has no such model or weights.
        """
        return _weights_of(address[len(PREFIX) :])

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def path(self) -> str:
        """Where a file that was downloaded elsewhere goes, below ``$TORCH_HOME``."""
        suffix = os.path.splitext(self.hub_file)[1]
        return os.path.join(torch.hub.get_dir(), "checkpoints", f"{self.name}{suffix}")

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/main/{self.hub_file}"

    def __str__(self) -> str:
        return f"timm's {self.name}"

    def has_bottlenecks(self) -> bool:
        """Whether it is a ResNet of blocks of three convolutions, with the stride in the second."""
        timm = import_timm("MODEL.WEIGHTS")
        # Building a model takes a while; only these have Detectron2's blocks.
        of_resnets = timm.model_entrypoint(self.model).__module__.endswith(".resnet")
        return of_resnets and "layer1.0.conv3.weight" in self.shapes()

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the tensors of the classifier, by timm's names; the file is not read."""
        return dict(_shapes_of(self.model))

    def read(self) -> dict[str, torch.Tensor]:
        """Return the state dict of the classifier, by timm's names.

        The file is :attr:`path` if it is there, else the hub's, downloaded into the hub's cache if that lacks it.

        Raises:
            UserError: it cannot be downloaded, or is not of this model.
        """
        path = self.path if os.path.exists(self.path) else self._downloaded()
        timm = import_timm("MODEL.WEIGHTS")
        try:
            # timm converts older layouts, and refuses what does not fill the classifier.
            own = {"file": path, "custom_load": False}
            return timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=own).state_dict()
        except Exception as error:  # whatever unpickling or filling the model raises
            reason = _reason(error)
            raise UserError(
                f"MODEL.WEIGHTS: {path} cannot be read as the weights of {self} ({reason}); remove it, and download it "
                "again."
            ) from error

    def _downloaded(self) -> str:
        try:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(self.repository, self.hub_file)
        except Exception as error:  # whatever the network, the disk or the hub raises
            reason = _reason(error)
            raise UserError(
                f"MODEL.WEIGHTS: {self.hub_file}, the weights of {self}, cannot be downloaded ({reason}); download "
                f"{self.url} elsewhere and put it at {self.path}."
            ) from error


def is_timm_address(weights: str) -> bool:
    return weights.startswith(PREFIX)


@functools.lru_cache(maxsize=None)
def _weights_of(name: str) -> TimmWeights:
    timm = import_timm(f"MODEL.WEIGHTS {PREFIX}{name}")
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        similar = difflib.get_close_matches(model, timm.list_models(), n=1)
        remedy = f"did you mean {PREFIX}{similar[0]}?" if similar else "timm.list_models() names all."
        raise UserError(f"MODEL.WEIGHTS: timm {timm.__version__} has no model {model!r}; {remedy}")
    listed = [*timm.list_pretrained(f"{model}.*"), *timm.list_pretrained(model)]
    known = list(dict.fromkeys(each.partition(".")[2] for each in listed))
    if tag and tag not in known:
        raise UserError(
            f"MODEL.WEIGHTS: timm's {model} has no weights {tag!r}; use one of {', '.join(known) or 'another model'}, "
            f"or {PREFIX}{model} for its default."
        )
    cfg: Any = timm.get_pretrained_cfg(name) if known else None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"MODEL.WEIGHTS: timm has no file of {name!r} on its hub; name a file of your own.")
    return TimmWeights(
        model,
        cfg.tag or "",
        cfg.hf_hub_id,
        cfg.hf_hub_filename or "model.safetensors",
        tuple(255 * value for value in cfg.mean),
        tuple(255 * value for value in cfg.std),
    )


@functools.lru_cache(maxsize=None)
def _shapes_of(model: str) -> tuple[tuple[str, torch.Size], ...]:
    timm = import_timm("MODEL.WEIGHTS")
    return tuple((name, value.shape) for name, value in timm.create_model(model).state_dict().items())


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".:")
