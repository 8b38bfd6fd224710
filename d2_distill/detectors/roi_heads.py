"""The box branch of Detectron2's RoI heads in stages: RoI vectors, predictions, and the steps of a cascade."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import UserError
from ..layers.class_outputs import ClassScores, keep_outputs


@dataclass(frozen=True)
class RoIOutputs:
    """What a box head makes of R RoIs, all images one after the other.

    Attributes:
        vectors: (R, D) behind the ReLU of each fully connected layer, in order; none if the box head is not a
            FastRCNNConvFCHead with such layers.
        logits: (R, K + 1), background last.
        deltas: (R, 4K), or (R, 4) if boxes are class-agnostic.
    """

    vectors: list[torch.Tensor]
    logits: torch.Tensor
    deltas: torch.Tensor


@dataclass(frozen=True)
class RoIStage:
    """A stage of the box branch in training.

    Attributes:
        proposals: per image ``proposal_boxes`` and ``gt_classes`` (K: background), and ``gt_boxes`` if the image
            has objects.
        outputs: of these proposals.
    """

    proposals: list[Instances]
    outputs: RoIOutputs


class StagedRoIHeads:
    """How the box branch of StandardROIHeads or CascadeROIHeads is run stage by stage.

    It is a view: the RoI heads keep all parameters. StandardROIHeads have one stage.
    """

    def __init__(self, roi_heads: StandardROIHeads) -> None:
        self.roi_heads = roi_heads
        if isinstance(roi_heads.box_predictor, nn.ModuleList):
            self._heads, self._predictors = list(roi_heads.box_head), list(roi_heads.box_predictor)
            self._matchers = roi_heads.proposal_matchers
        else:
            self._heads, self._predictors = [roi_heads.box_head], [roi_heads.box_predictor]
            self._matchers = [roi_heads.proposal_matcher]

    @property
    def in_features(self) -> list[str]:
        """Names of the features that RoIs are pooled from."""
        return list(self.roi_heads.box_in_features)

    @property
    def num_stages(self) -> int:
        return len(self._heads)

    @property
    def fc_dims(self) -> list[int]:
        """Width of each fully connected layer of a stage, which is that of ``RoIOutputs.vectors``.

        Raises:
            UserError: the box head has none, or is of a class whose layers are not known.
        """
        head = self._heads[0]
        dims = [layer.out_features for layer in _layers(head).values() if isinstance(layer, nn.Linear)]
        if not dims:
            raise UserError(
                f"The RoI box head {type(head).__name__} has no fully connected layers that can be compared; "
                "set MODEL.ROI_BOX_HEAD.NAME 'FastRCNNConvFCHead' with MODEL.ROI_BOX_HEAD.NUM_FC above 0."
            )
        return dims

    def stage(self, index: int, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> RoIOutputs:
        """Pool the RoIs and run one stage's box head and predictor.

        Args:
            index: of the stage.
            features: (N, C, H, W) of each name that the heads read; they may be another detector's.
            boxes: per image, in pixels of the batch.
        """
        maps = [features[name] for name in self.in_features]
        x, vectors = self.roi_heads.box_pooler(maps, boxes), []
        for name, layer in _layers(self._heads[index]).items():
            x = layer(x)
            if name.startswith("fc_relu"):
                vectors.append(x)
        logits, deltas = self._predictors[index](x)
        return RoIOutputs(vectors, logits, deltas)

    def run(
        self, features: dict[str, torch.Tensor], sampled: list[Instances], gt_instances: list[Instances]
    ) -> list[RoIStage]:
        """All stages in training.

        The first is on the sampled proposals as they are. Each next one is on the boxes that the last one
        predicted, clipped to the image and without the empty ones, labelled at its own IoU threshold. No gradient
        passes from a stage to the one before through boxes.

        Args:
            sampled: what ``roi_heads.label_and_sample_proposals`` returned.
            gt_instances: ground truth of the batch, one entry an image.
        """
        stages: list[RoIStage] = []
        for index in range(self.num_stages):
            proposals = self._refine(stages[-1], index, gt_instances) if stages else sampled
            boxes = [image.proposal_boxes for image in proposals]
            stages.append(RoIStage(proposals, self.stage(index, features, boxes)))
        return stages

    def losses(
        self, stages: Sequence[RoIStage], stage_weights: Sequence[float] | None = None
    ) -> dict[str, torch.Tensor]:
        """The RoI heads' own losses; a cascade's names end with ``_stage0``, ...

        Detectron2's cascade also divides the gradient that each stage sends to the features by the number of stages;
        here it is not divided. The published HEAD weighs the losses of three stages 1, 1/2, 1/4 instead.

        Args:
            stages: the result of :meth:`run`.
            stage_weights: factors on each stage's losses; None for 1.
        """
        if stage_weights is None:
            stage_weights = [1.0] * self.num_stages
        losses = {}
        for index, (stage, weight) in enumerate(zip(stages, stage_weights)):
            suffix = f"_stage{index}" if self.num_stages > 1 else ""
            # Its accuracies are recorded stage by stage, as by Detectron2's cascade.
            scope = get_event_storage().name_scope(suffix[1:]) if suffix else contextlib.nullcontext()
            with scope:
                of_stage = self._predictors[index].losses(
                    (stage.outputs.logits, stage.outputs.deltas), stage.proposals
                )
            losses.update({f"{name}{suffix}": weight * loss for name, loss in of_stage.items()})
        return losses

    @torch.no_grad()
    def _refine(self, last: RoIStage, index: int, gt_instances: list[Instances]) -> list[Instances]:
        """Proposals of stage ``index`` from the boxes that the last stage predicted."""
        outputs = (last.outputs.logits, last.outputs.deltas)
        predicted = self._predictors[index - 1].predict_boxes(outputs, last.proposals)
        refined = []
        for truth, boxes in zip(gt_instances, predicted):
            boxes = Boxes(boxes)
            boxes.clip(truth.image_size)
            refined.append(self._label(boxes[boxes.nonempty()], truth, index))
        return refined

    def _label(self, boxes: Boxes, truth: Instances, index: int) -> Instances:
        matches, labels = self._matchers[index](pairwise_iou(truth.gt_boxes, boxes))
        proposals = Instances(truth.image_size, proposal_boxes=boxes)
        if len(truth) > 0:
            proposals.gt_boxes = truth.gt_boxes[matches]
            proposals.gt_classes = truth.gt_classes[matches].masked_fill(labels == 0, self.roi_heads.num_classes)
        else:
            proposals.gt_classes = torch.full_like(matches, self.roi_heads.num_classes)
        return proposals


def keep_roi_classes(roi_heads: nn.Module, classes: Sequence[int]) -> None:
    """Change any RoI heads of Detectron2, weights included, into such of these classes only, in this order."""
    before, predictors = roi_heads.num_classes, roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        if len(classes) < before:
            predictor.cls_score = ClassScores(predictor.cls_score, classes)
        else:
            keep_outputs(predictor.cls_score, [*classes, before])
        if predictor.bbox_pred.out_features == 4 * before:  # else class-agnostic
            keep_outputs(predictor.bbox_pred, [4 * k + side for k in classes for side in range(4)])
        predictor.num_classes = len(classes)
    masks = getattr(getattr(roi_heads, "mask_head", None), "predictor", None)
    if masks is not None and masks.out_channels == before:  # else class-agnostic
        keep_outputs(masks, classes)
    roi_heads.num_classes = len(classes)


def _layers(head: nn.Module) -> dict[str, nn.Module]:
    """The layers of a box head by name, to be run one after the other; an unknown head is a single one."""
    return dict(head.named_children()) if type(head) is FastRCNNConvFCHead else {"box_head": head}
