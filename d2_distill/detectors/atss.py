"""ATSS: one anchor a location, positives by statistics of the overlaps."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ..assigners import ATSSAssigner
from ..config.keys import extend_config
from .box_coders import DeltaCoder, DistributionCoder
from .criteria import FocalCenterness
from .head import TowerHead
from .keys import dense_head_keys
from .tower_detector import TowerDetector, build_box_loss, common_arguments, head_arguments, square_anchors


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.ATSS = dense_head_keys()
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Side of the anchor, in strides.
    node.ANCHOR_SCALE = 8
    # Candidates of a box on each level.
    node.ATSS_TOPK = 9
    # Factors on the box deltas.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    node.REG_MAX = 0
    node.BOX_LOSS = "giou"
    node.BOX_LOSS_WEIGHT = 2.0
    # Lower bound of the sum of centerness targets that the box loss is divided by.
    node.NORMALIZER_FLOOR = 1.0


@META_ARCH_REGISTRY.register()
class ATSS(TowerDetector):
    """ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424), configured by ``MODEL.ATSS``.

    With ``MODEL.ATSS.REG_MAX`` above 0 it predicts distributions instead of deltas, as localisation
    distillation needs; they are trained through their mean alone.
    """

    config_node = "ATSS"

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.ATSS
        arguments, input_shape = common_arguments(cfg, "ATSS")
        coder = DistributionCoder(node.REG_MAX) if node.REG_MAX else DeltaCoder(node.BBOX_REG_WEIGHTS)
        return {
            **arguments,
            "head": TowerHead(
                **head_arguments(node, input_shape),
                num_scores=node.NUM_CLASSES,
                box_dim=coder.box_dim,
                centerness_on="box",
            ),
            "anchor_generator": square_anchors(input_shape, scale=node.ANCHOR_SCALE, offset=0.0),
            "assigner": ATSSAssigner(node.ATSS_TOPK),
            "box_coder": coder,
            "criterion": FocalCenterness(
                focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
                focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
                box_loss=build_box_loss(node.BOX_LOSS, "MODEL.ATSS.BOX_LOSS"),
                box_loss_weight=node.BOX_LOSS_WEIGHT,
                normalizer_floor=node.NORMALIZER_FLOOR,
                counts_empty_images=True,
            ),
        }
