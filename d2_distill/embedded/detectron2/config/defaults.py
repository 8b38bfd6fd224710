"""``_C``, the default configuration, read from ``defaults.yaml``."""

from __future__ import annotations

from pathlib import Path

import yaml

from .config import CfgNode

# full_load keeps tuples (!!python/tuple); yacs would refuse to merge a tuple setting's value otherwise.
_C = CfgNode(yaml.full_load(Path(__file__).with_name("defaults.yaml").read_text()))
