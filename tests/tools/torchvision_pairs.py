"""Random detectors of torchvision beside their conversions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from d2_distill.apps.conversion.torchvision import convert_torchvision
from d2_distill.detectors.building import build_detector

State = dict[str, torch.Tensor]

# Shorter sides are not scaled; P6 and P7 of (64, 100), padded to (96, 128) in a batch with the other, have cells that
# are no stride apart.
SIZES = ((64, 100), (90, 64))
_SMALL = {"min_size": 64, "max_size": 640}
# Few proposals: the second version's box head is slow.
PROPOSALS = 50


def build(name: str, num_outputs: int) -> nn.Module:
    """A whole model of torchvision by its name."""
    builder = getattr(torchvision.models.detection, name)
    few = {"rpn_post_nms_top_n_test": PROPOSALS} if "rcnn" in name else {}
    model = builder(weights=None, weights_backbone=None, num_classes=num_outputs, **_SMALL, **few)
    return diversify(model, num_outputs)


def small(kind: str, num_outputs: int) -> nn.Module:
    """On ResNet-18 with frozen batch norms."""
    options = {"backbone_name": "resnet18", "weights": None}
    if kind == "fasterrcnn":
        model = FasterRCNN(resnet_fpn_backbone(**options), num_outputs, **_SMALL)
    else:
        options.update({"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)})
        model = {"retinanet": RetinaNet, "fcos": FCOS}[kind](resnet_fpn_backbone(**options), num_outputs, **_SMALL)
    return diversify(model, num_outputs)


@torch.no_grad()
def diversify(model: nn.Module, num_outputs: int) -> nn.Module:
    """Statistics and parameters that tell channels apart, and no detection of what no training ever labels."""
    torch.manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            tensor.uniform_(-0.5, 0.5)
        elif tensor.dim() == 1:  # biases, and affine maps of norms
            tensor.add_(torch.empty_like(tensor).uniform_(-0.3, 0.1))
        elif "backbone.body" not in name and tensor.dim() > 1:
            tensor.add_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
    unlabelled = [0, *_GAPS] if num_outputs == 91 else [0]
    if hasattr(model, "roi_heads"):
        unlabelled.remove(0)
        scores, anchors = model.roi_heads.box_predictor.cls_score, 1
    else:
        scores = model.head.classification_head.cls_logits
        anchors = model.anchor_generator.num_anchors_per_location()[0]
        scores.weight.mul_(2)
        scores.bias.add_(1)
        if anchors == 1:  # FCOS: boxes with area
            model.head.regression_head.bbox_reg.bias.add_(1)
            model.head.regression_head.bbox_ctrness.bias.add_(1)
    for tensor, value in ((scores.weight, 0.0), (scores.bias, -50.0)):
        tensor.unflatten(0, (anchors, num_outputs))[:, unlabelled] = value
    return model.eval()


# Category numbers that COCO's detection task does not have.
_GAPS = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


@dataclass
class Pair:
    """A detector, and what was made of it.

    Attributes:
        cfg: of ours.
    """

    theirs: nn.Module
    ours: nn.Module
    cfg: CfgNode

    @classmethod
    def of(cls, theirs: nn.Module, state: State, **options: Any) -> "Pair":
        """Convert ``state`` and fill a model with it exactly."""
        conversion = convert_torchvision(state, **options)
        conversion.cfg.MODEL.DEVICE = "cpu"
        ours = build_detector(conversion.cfg).eval()
        missing, unexpected = ours.load_state_dict(conversion.state_dict, strict=False)
        assert not missing and all(name.endswith("num_batches_tracked") for name in unexpected)
        return cls(theirs, ours, conversion.cfg)

    @cached_property
    def images(self) -> list[torch.Tensor]:
        """uint8, of SIZES."""
        generator = torch.Generator().manual_seed(2)
        return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]

    @cached_property
    @torch.no_grad()
    def features(self) -> dict[str, torch.Tensor]:
        """Our maps by name."""
        return self.ours.backbone(self.our_images().tensor)

    def our_images(self) -> ImageList:
        return self.ours.preprocess_image([{"image": image} for image in self.images])

    def their_images(self):
        return self.theirs.transform([image / 255 for image in self.images])[0]


@torch.no_grad()
def assert_same_detections(pair: Pair, at_least: int = 20) -> None:
    """Each detection of either side has a like one on the other: class, score, and box.

    Ours drop boxes without area; between 0 and 0.01 pixels torchvision's Faster R-CNN drops them, too.
    """
    found = pair.ours([{"image": image} for image in pair.images])
    for theirs, ours in zip(pair.theirs([image / 255 for image in pair.images]), found):
        ours = ours["instances"]
        rows = [
            _rows(theirs["boxes"], theirs["scores"], theirs["labels"] - 1),
            _rows(ours.pred_boxes.tensor, ours.scores, _labels_of(pair, ours.pred_classes)),
        ]
        assert min(map(len, rows)) >= at_least
        distance = torch.cdist(*rows, p=float("inf"))
        for dim in (0, 1):  # but for scores and overlaps next to a threshold
            assert (distance.amin(dim=dim) < 1e-2).float().mean() > 0.97


def _labels_of(pair: Pair, classes: torch.Tensor) -> torch.Tensor:
    """Their labels less 1 of our classes, which are contiguous where COCO's category numbers are not."""
    if len(pair.cfg.DATASETS.CLASSES) != 80:
        return classes
    numbers = [number for number in range(1, 91) if number not in _GAPS]
    return torch.tensor(numbers)[classes] - 1


def _rows(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, 6) box in pixels, score in tenths of a thousandth, class in hundreds."""
    rows = torch.cat([boxes, scores[:, None] * 1e2, labels[:, None] * 1e2], dim=1)
    return rows[(boxes[:, 2:] - boxes[:, :2] > 1e-2).all(dim=1)]
