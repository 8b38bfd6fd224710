"""Readers of data set formats; importing this registers the builtin data sets."""

from . import builtin  # noqa: F401
from .coco import load_coco_json, register_coco_instances  # noqa: F401
from .pascal_voc import load_voc_instances, register_pascal_voc  # noqa: F401
