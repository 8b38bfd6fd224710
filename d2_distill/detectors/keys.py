"""The config keys that the heads of FCOS, ATSS and GFL share."""

from __future__ import annotations

from detectron2.config import CfgNode


def dense_head_keys() -> CfgNode:
    """Return a new node with these keys and their defaults, to which a detector adds its own.

    Two more keys mean the same in every detector that has them. ``BOX_LOSS`` is "giou", "iou" (its logarithm),
    "linear_iou", "diou" or "ciou". ``REG_MAX`` above 0 predicts each side of a box as a distribution over 0..REG_MAX
    strides.
    """
    node = CfgNode()
    node.NUM_CLASSES = 80
    # Features that the head reads, fine to coarse.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Blocks of each tower.
    node.NUM_CONVS = 4
    # Norm in the towers: "" or a name that detectron2.layers.get_norm knows.
    node.NORM = "GN"
    # Class probability at initialization.
    node.PRIOR_PROB = 0.01
    # Lowest score of a detection.
    node.SCORE_THRESH_TEST = 0.05
    # Candidates of a level before non-maximum suppression.
    node.TOPK_CANDIDATES_TEST = 1000
    # Overlap above which a detection suppresses another of its class.
    node.NMS_THRESH_TEST = 0.6
    return node
