"""A converted detector: all tensors by our names, and the config of the model that they fill."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from ...config.reading import read_config
from ...detectors.building import num_classes_key
from ...errors import UserError
from .tensors import Converted


@dataclass(frozen=True)
class Conversion:
    """
    Attributes:
        state_dict: by our names.
        cfg: config of the detector.
        keys: of the config that were set.
    """

    state_dict: dict[str, torch.Tensor]
    cfg: CfgNode
    keys: list[str]

    @classmethod
    def of(cls, converted: Converted, *, opts: Sequence[str], source: str) -> "Conversion":
        """
        Args:
            converted: the whole detector.
            opts: flat list of config keys and values, which override all else.
            source: what error messages call the checkpoint.

        Raises:
            UserError: ``opts`` do not fit the config, or the names of the classes are not as many as the outputs.
        """
        state_dict, settings = converted
        flat = [item for pair in settings.items() for item in pair]
        cfg = read_config("", [*flat, *opts], source=f"The config of {source} with the command line's KEY VALUE")
        names, outputs = cfg.DATASETS.CLASSES, functools.reduce(getattr, num_classes_key(cfg).split("."), cfg)
        if names and len(names) != outputs:
            raise UserError(
                f"DATASETS.CLASSES has {len(names)} names, but {source} has {outputs} classes; name each once."
            )
        return cls(state_dict, cfg, list(dict.fromkeys([*settings, *opts[::2]])))

    def yaml(self, **more: Any) -> str:
        """The keys as a config file, with further keys below MODEL."""
        tree: dict[str, Any] = {"VERSION": 2, "MODEL": more}
        for key in self.keys:
            *path, last = key.split(".")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
            node[last] = functools.reduce(getattr, key.split("."), self.cfg)
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def merged(parts: Iterable[Converted]) -> Converted:
    """The parts of a detector as one; of a key that several have, the last one's value counts."""
    state_dict: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for part_tensors, part_settings in parts:
        state_dict.update(part_tensors)
        settings.update(part_settings)
    return state_dict, settings
