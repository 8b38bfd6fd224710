"""Selection of RPN proposals, and ground truth as additional proposals."""

from __future__ import annotations

import math

import torch
from detectron2.layers import batched_nms, cat
from detectron2.structures import Boxes, Instances
from torch import Tensor

# The objectness of a ground-truth box: the logit of a probability of almost 1.
_GT_LOGIT = math.log((1.0 - 1e-10) / (1.0 - (1.0 - 1e-10)))


def find_top_rpn_proposals(
    proposals: list[Tensor], pred_objectness_logits: list[Tensor], image_sizes: list[tuple[int, int]],
    nms_thresh: float, pre_nms_topk: int, post_nms_topk: int, min_box_size: float, training: bool,
) -> list[Instances]:
    """The best boxes of every image after non-maximum suppression within each level.

    Args:
        proposals: per level, decoded boxes (N, R_l, 4).
        pred_objectness_logits: per level, (N, R_l).
        image_sizes: (height, width) of every image without padding; boxes are clipped to it.
        pre_nms_topk, post_nms_topk: how many to keep per level before, and per image after suppression.
        min_box_size: both sides of a box must be longer, in pixels of the network's input.
        training: non-finite predictions raise FloatingPointError; otherwise they are dropped.

    Returns:
        per image, Instances with ``proposal_boxes`` and ``objectness_logits``, by descending logit.
    """
    logits_per_level, boxes_per_level, level_ids = [], [], []
    for level, (boxes, logits) in enumerate(zip(proposals, pred_objectness_logits)):
        top_logits, top = logits.topk(min(pre_nms_topk, logits.shape[1]), dim=1)
        logits_per_level.append(top_logits)
        boxes_per_level.append(boxes.gather(1, top.unsqueeze(-1).expand(-1, -1, 4)))
        level_ids.append(torch.full_like(top[0], level))
    all_logits, all_boxes, levels = cat(logits_per_level, 1), cat(boxes_per_level, 1), cat(level_ids)

    results = []
    for image_size, logits, box_tensor in zip(image_sizes, all_logits, all_boxes):
        finite = torch.isfinite(box_tensor).all(dim=1) & torch.isfinite(logits)
        if training and not finite.all():
            raise FloatingPointError("The RPN's boxes or scores are not finite: the training has diverged.")
        boxes = Boxes(box_tensor[finite])
        boxes.clip(image_size)
        large = boxes.nonempty(threshold=min_box_size)
        boxes, logits, level = boxes[large], logits[finite][large], levels[finite][large]
        keep = batched_nms(boxes.tensor, logits, level, nms_thresh)[:post_nms_topk]
        results.append(Instances(image_size, proposal_boxes=boxes[keep], objectness_logits=logits[keep]))
    return results


def add_ground_truth_to_proposals(gt: list[Instances], proposals: list[Instances]) -> list[Instances]:
    """Per image, the proposals followed by its ground-truth boxes, whose objectness is almost certain."""
    results = []
    for truth, found in zip(gt, proposals):
        logits = found.objectness_logits.new_full((len(truth),), _GT_LOGIT)
        truth = Instances(found.image_size, proposal_boxes=truth.gt_boxes, objectness_logits=logits)
        results.append(Instances.cat([found, truth]))
    return results
