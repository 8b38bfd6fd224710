"""What is exported: modules from an image tensor to named tensors, made of the detector as it is."""

from __future__ import annotations

import torch
from detectron2.structures import ImageList
from torch import nn

from ...detectors.nms import OWN_NMS
from ...errors import UserError
from ...staged import stage_detector


class Detections(nn.Module):
    """The detector in eval mode as it is, post-processing included.

    Takes one image (1, 3, H, W), 0 to 255, in the config's channel order; gives boxes (M, 4) XYXY in its pixels, scores
    (M,) and classes (M,), best first.
    """

    output_names: tuple[str, ...] = ("boxes", "scores", "classes")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        [output] = self.model([{"image": images[0]}])
        found = output["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


class RawOutputs(nn.Module):
    """The outputs of a dense detector's head for all R anchors, nothing selected.

    Takes images (N, 3, H, W) of one size. Gives what the head predicts, "logits" (N, R, num_scores), "deltas" (N, R,
    box_dim) and where there is one "centerness" (N, R, 1), and what it means: "scores" (N, R, num_classes), the class
    probabilities without centerness, and "boxes" (N, R, 4), XYXY in pixels, not clipped.

    Raises:
        UserError: the detector is not dense.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.eval()
        self._staged = stage_detector(model)
        if self._staged.family != "dense":
            raise UserError(
                f"{type(model).__name__} has no raw outputs: only one-stage detectors predict something at every anchor; "
                "export it with its post-processing, without --raw."
            )
        self.output_names = (*self._staged.predictors, "scores", "boxes")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # One image of four dimensions: what normalises and pads an image does so with a batch of equal ones.
        batch = self._staged.preprocess([{"image": images}])
        run = self._staged.run(ImageList(batch.tensor[0], batch.image_sizes), frozen=True)
        scores = self._staged.class_scores(run.outputs)[..., : self._staged.num_classes]
        return (*run.outputs.values(), scores, self._staged.decode(run.grid, run.outputs["deltas"]))


def build_graph(model: nn.Module, nms: str, *, raw: bool) -> nn.Module:
    """The module to export.

    Args:
        nms: ``TEST.NMS`` of the detector's config.
        raw: the head's outputs instead of detections.

    Raises:
        UserError: the detector cannot be exported like this.
    """
    if raw:
        return RawOutputs(model)
    if nms != OWN_NMS:
        raise UserError(
            f"TEST.NMS is {nms!r}, a loop that graphs do not hold; set it to {OWN_NMS!r}, or export --raw and suppress "
            "duplicates yourself."
        )
    return Detections(model)
