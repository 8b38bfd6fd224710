"""A user's own detectors, as a file for IMPORTS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, detector_postprocess
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from d2_distill import StagedDetector, register_staged
from d2_distill.detectors import GFL
from d2_distill.staged import Run, stage


def add_config(cfg):
    cfg.MODEL.QUERIES = CfgNode({"COUNT": 5, "CLASSES": 80, "IN_FEATURES": ["p3", "p4", "p5"]})
    cfg.MODEL.PLAIN = CfgNode({"CLASSES": 80})


class Queries(nn.Module):
    """The least that a query detector is: a pooled pyramid and learned queries give a set of boxes.

    Each query is for the object of its number, so that nothing has to be matched.
    """

    def __init__(self, cfg, num_classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        shapes = self.backbone.output_shape()
        self.in_features = cfg.MODEL.QUERIES.IN_FEATURES
        channels = sum(shapes[name].channels for name in self.in_features)
        self.queries = nn.Embedding(cfg.MODEL.QUERIES.COUNT, channels)
        self.scores, self.boxes = nn.Linear(channels, num_classes + 1), nn.Linear(channels, 4)
        self.register_buffer("pixel_mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), False)

    def preprocess_image(self, batched_inputs) -> ImageList:
        images = [(x["image"].to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def decode(self, features) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, Q, K + 1), background last, and boxes (N, Q, 4), centre and size in parts of the batch's."""
        pooled = torch.cat([features[name].mean(dim=(2, 3)) for name in self.in_features], dim=1)
        decoded = torch.tanh(pooled[:, None] + self.queries.weight)
        return self.scores(decoded), self.boxes(decoded).sigmoid()

    def losses(self, features, images: ImageList, gt_instances) -> dict[str, torch.Tensor]:
        logits, boxes = self.decode(features)
        classes = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
        targets, matched = torch.zeros_like(boxes), torch.zeros_like(boxes)
        height, width = images.tensor.shape[-2:]
        for index, truth in enumerate(gt_instances):
            count = min(len(truth), logits.shape[1])
            classes[index, :count] = truth.gt_classes[:count]
            x0, y0, x1, y1 = truth.gt_boxes.tensor[:count].unbind(dim=1)
            sides = [(x0 + x1) / (2 * width), (y0 + y1) / (2 * height), (x1 - x0) / width, (y1 - y0) / height]
            targets[index, :count], matched[index, :count] = torch.stack(sides, dim=1), 1.0
        return {
            "loss_cls": F.cross_entropy(logits.flatten(0, 1), classes.flatten()),
            "loss_box": (F.l1_loss(boxes, targets, reduction="none") * matched).sum() / matched.sum().clamp(min=1),
        }

    def forward(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            return self.losses(features, images, [x["instances"].to(self.pixel_mean.device) for x in batched_inputs])
        logits, boxes = self.decode(features)
        height, width = images.tensor.shape[-2:]
        outputs = []
        for x, size, probabilities, each in zip(batched_inputs, images.image_sizes, logits.softmax(dim=-1), boxes):
            (cx, cy), (w, h) = each[:, :2].unbind(dim=1), each[:, 2:].unbind(dim=1)
            xs, ys = [(cx - w / 2) * width, (cx + w / 2) * width], [(cy - h / 2) * height, (cy + h / 2) * height]
            found = Instances(size, pred_boxes=Boxes(torch.stack([xs[0], ys[0], xs[1], ys[1]], dim=1)))
            found.scores, found.pred_classes = probabilities[:, :-1].max(dim=1)
            found = detector_postprocess(found, x.get("height", size[0]), x.get("width", size[1]))
            outputs.append({"instances": found})
        return outputs


@META_ARCH_REGISTRY.register()
class QueryDetector(Queries):
    """A query detector with an adapter."""

    def __init__(self, cfg) -> None:
        super().__init__(cfg, cfg.MODEL.QUERIES.CLASSES)


@register_staged(QueryDetector)
class StagedQueryDetector(StagedDetector):
    family = "query"

    @classmethod
    def num_classes_key(cls, model_class, cfg) -> str:
        return "MODEL.QUERIES.CLASSES"

    @property
    def num_classes(self) -> int:
        return self.model.scores.out_features - 1

    def feature_shapes(self):
        shapes = self.model.backbone.output_shape()
        return {name: shapes[name] for name in self.model.in_features}

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> QueryRun:
        return QueryRun(self, images, gt_instances, taps or {}, frozen)


class QueryRun(Run):
    @stage
    def losses(self):
        return self.staged.model.losses(self.features, self.images, self.gt_instances)


@META_ARCH_REGISTRY.register()
class NoAdapter(Queries):
    """A detector that nothing is known of but what Detectron2 asks for."""

    def __init__(self, cfg) -> None:
        super().__init__(cfg, cfg.MODEL.PLAIN.CLASSES)


@META_ARCH_REGISTRY.register()
class CountedNoAdapter(NoAdapter):
    """It tells its number of classes as Detectron2's dense detectors do."""

    def __init__(self, cfg) -> None:
        super().__init__(cfg)
        self.num_classes = cfg.MODEL.PLAIN.CLASSES


@META_ARCH_REGISTRY.register()
class OwnForward(RetinaNet):
    """A RetinaNet that overrides forward, so that the stages of RetinaNet are not its own."""

    def forward(self, batched_inputs):
        return super().forward(batched_inputs)


@META_ARCH_REGISTRY.register()
class OwnGFL(GFL):
    """Nothing else is needed."""
