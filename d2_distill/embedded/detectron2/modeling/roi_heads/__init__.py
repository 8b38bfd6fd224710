"""The heads on regions of interest (box branch) and their registries."""

from .box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead, build_box_head  # noqa: F401
from .cascade_rcnn import CascadeROIHeads  # noqa: F401
from .fast_rcnn import FastRCNNOutputLayers  # noqa: F401
from .roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads  # noqa: F401
