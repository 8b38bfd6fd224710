"""Data: catalogs, dataset dicts, augmentation, samplers and loaders."""

from .build import build_detection_test_loader, get_detection_dataset_dicts  # noqa: F401
from .catalog import DatasetCatalog, MetadataCatalog  # noqa: F401
from .dataset_mapper import DatasetMapper  # noqa: F401

from . import datasets  # noqa: F401  isort:skip  (registers the builtin data sets)
