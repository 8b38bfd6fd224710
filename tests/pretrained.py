"""Files of torchvision's weights in a folder of their own, with random values."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from .backbones.torchvision_trunks import diversify


def torchvision_model(name: str) -> nn.Module:
    """A classifier in eval mode, none of whose tensors is constant."""
    torch.manual_seed(0)
    return diversify(torchvision.models.get_model(name, weights=None)).eval()


def put_weights(torch_home: Path, model: nn.Module, name: str, entry: str = "DEFAULT") -> Path:
    """Save a model where torch, whose ``TORCH_HOME`` is the folder, keeps torchvision's file of these weights."""
    url = torchvision.models.get_model_weights(name)[entry].url
    path = torch_home / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path
