"""Layers: convolutions, norms, NMS and the small helpers around them."""

from .batch_norm import CycleBatchNormList, FrozenBatchNorm2d, get_norm  # noqa: F401
from .deform_conv import DeformConv, ModulatedDeformConv  # noqa: F401
from .wrappers import CNNBlockBase, Conv2d, ShapeSpec, batched_nms, cat, cross_entropy  # noqa: F401
