"""The OpenMMLab training convention: what it changes, and what it leaves as in Detectron2's RetinaNet."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2_distill.detectors import OpenMMLabRetinaNet
from d2_distill.staged import Assignment


def _config(architecture: str):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)
    ]
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.IOU_THRESHOLDS = [0.4, 0.5]
    return cfg


@pytest.fixture(scope="module")
def model() -> OpenMMLabRetinaNet:
    torch.manual_seed(0)
    return build_model(_config("OpenMMLabRetinaNet")).train()


def _input(height: int, width: int, boxes=(), classes=()):
    generator = torch.Generator().manual_seed(height + width)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {"image": torch.rand(3, height, width, generator=generator) * 255, "instances": instances}


def _losses(model, inputs):
    with EventStorage() as storage:
        losses = model(inputs)
        return losses, storage.latest()["num_pos_anchors"][0]


def _labels(model, inputs):
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    anchors = model.anchor_generator([features[name] for name in model.head_in_features])
    labels, boxes = model.label_anchors(anchors, [item["instances"] for item in inputs])
    return torch.stack(labels), torch.stack(boxes), Boxes.cat(anchors).tensor


def test_checkpoints_are_those_of_retinanet(model):
    stock = build_model(_config("RetinaNet"))
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    assert isinstance(model, type(stock)) and type(model) is not type(stock)


def test_losses_do_not_depend_on_the_batch_size_or_on_history(model):
    one = _input(64, 96, [[4, 4, 40, 44], [50, 10, 90, 60]], [0, 2])
    single, num_pos = _losses(model, [one])
    double, _ = _losses(model, [one, one])
    assert set(single) == {"loss_cls", "loss_box_reg"} and num_pos > 0
    for key in single:
        torch.testing.assert_close(double[key], single[key], rtol=1e-4, atol=1e-6)


def test_no_ground_truth(model):
    losses, num_pos = _losses(model, [_input(64, 64), _input(64, 64)])
    assert num_pos == 0 and losses["loss_box_reg"] == 0 and losses["loss_cls"].isfinite()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    labels, _, _ = _labels(model, [_input(64, 64)])
    assert (labels == 3).all()


def test_cells_of_batch_padding_are_ignored(model):
    small = _input(50, 62, [[4, 4, 40, 44]], [1])
    alone, _, _ = _labels(model, [small])
    labels, boxes, anchors = _labels(model, [_input(128, 160, [[8, 8, 100, 90]], [0]), small])
    padding = ((anchors[:, :2] + anchors[:, 2:]) / 2 > 63.5).any(dim=1)  # the small image's own size is 64x64
    assert (labels[1][padding] == -1).all() and (labels[0][padding] >= 0).any()
    assert torch.equal(labels[1][~padding].sort().values, alone[0].sort().values) and (alone == 1).any()
    assert torch.equal(boxes[1][labels[1] == 1][0], torch.tensor([4.0, 4.0, 40.0, 44.0]))


def test_normalizer():
    """An image without a positive counts as one, ignored anchors do not count."""
    labels = torch.tensor([[0, 2, 3, -1], [3, 3, -1, -1], [1, 3, 3, 3]])
    assert Assignment(labels, boxes=torch.zeros(3, 4, 4), num_classes=3).normalizer == 2 + 1 + 1


def test_boxes_are_bounded_on_both_sides_at_inference(model):
    box = model.box2box_transform.apply_deltas(
        torch.tensor([[0.0, 0, -20, -20]]), torch.tensor([[0.0, 0, 100, 100]])
    )
    torch.testing.assert_close(box, torch.tensor([[49.2, 49.2, 50.8, 50.8]]))
