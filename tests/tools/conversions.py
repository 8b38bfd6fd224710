"""Runs a converter of checkpoints as from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from d2_distill.checkpoint.exact import load_exactly
from d2_distill.config.reading import read_config
from d2_distill.detectors.building import build_detector


def run(tool, arguments: Sequence[str]) -> None:
    tool.run(tool.parser().parse_intermixed_args(arguments))


def convert_file(tool, folder: Path, capsys, content: Any, *arguments: str) -> tuple[CfgNode, nn.Module]:
    """The printed config, and its model with the written weights."""
    torch.save(content, folder / "theirs.pth")
    run(tool, [str(folder / "theirs.pth"), str(folder / "ours.pth"), *arguments])
    (folder / "ours.yaml").write_text(capsys.readouterr().out)
    cfg = read_config(str(folder / "ours.yaml"), ["MODEL.DEVICE", "cpu"], source="What was printed")
    model = build_detector(cfg).eval()
    load_exactly(model, cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS")
    return cfg, model
