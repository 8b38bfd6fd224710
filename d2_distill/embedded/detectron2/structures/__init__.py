"""Data types of images and objects: boxes, per-image instances, image batches."""

from .boxes import Boxes, BoxMode, pairwise_iou, pairwise_point_box_distance  # noqa: F401
from .image_list import ImageList  # noqa: F401
from .instances import Instances  # noqa: F401
