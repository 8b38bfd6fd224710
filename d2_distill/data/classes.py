"""Class names of a config's data."""

from __future__ import annotations

from typing import List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog


def dataset_classes(cfg: CfgNode) -> List[str]:
    """Class names of the first training set; empty if they are not known without loading it."""
    if not cfg.DATASETS.TRAIN:
        return []
    return list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", None) or [])
