"""The OpenMMLab training convention: what it changes, and what it leaves as in Detectron2's RetinaNet."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.assigners import Assignment
from d2_distill.detectors import OpenMMLabRetinaNet
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector

from ..small_detectors import batch, build, detector_cfg, image_input


@pytest.fixture(scope="module")
def model() -> OpenMMLabRetinaNet:
    return build(detector_cfg("OpenMMLabRetinaNet"), salt=2).train()


def _losses(model, inputs):
    with EventStorage() as storage:
        losses = model(inputs)
        return losses, storage.latest()["num_pos_anchors"][0]


def _assign(model, inputs):
    """The anchors of all levels, and the assignment."""
    run = stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])
    return run.grid.boxes, run.assignment


@pytest.mark.parametrize("norm", ["", "GN"])
def test_checkpoints_are_those_of_retinanet(norm):
    """A stock checkpoint fits, and its head predicts the same."""
    ours, stock = (
        build(detector_cfg(name, RETINANET__NORM=norm), salt=salt)
        for salt, name in enumerate(("OpenMMLabRetinaNet", "RetinaNet"))
    )
    ours.load_state_dict(stock.state_dict())
    torch.manual_seed(0)
    features = [torch.randn(1, 32, 8 // 2**level, 12 // 2**level) for level in range(3)]
    for levels, expected in zip(ours.head(features), stock.head(features)):
        assert all(torch.equal(x, y) for x, y in zip(levels, expected))
    anchors = (detector.anchor_generator(features) for detector in (ours, stock))
    assert all(torch.equal(x.tensor, y.tensor) for x, y in zip(*anchors))


@pytest.mark.parametrize("norm", ["", "GN"])
def test_initialisation_is_that_of_retinanet(norm):
    """Layer by layer in mean and deviation; biases exactly."""
    names = ("OpenMMLabRetinaNet", "RetinaNet")
    ours, stock = (build(detector_cfg(name, RETINANET__NORM=norm)) for name in names)
    for (name, value), expected in zip(ours.head.state_dict().items(), stock.head.state_dict().values()):
        if value.dim() == 1:
            assert torch.equal(value, expected), name
        else:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.1), name


def test_losses_are_divided_by_the_positives_of_the_batch(model):
    """As Detectron2 would with that normalizer, on the same labels; a step changes no state."""
    inputs = batch()
    losses, num_pos = _losses(model, inputs)
    assert num_pos > 0 and set(losses) == {"loss_cls", "loss_box_reg"}
    again, _ = _losses(model, inputs)
    assert all(torch.equal(again[name], loss) for name, loss in losses.items())

    anchors, assignment = _assign(model, inputs)
    stock = build(detector_cfg("RetinaNet"))
    stock.load_state_dict(model.state_dict())
    features = model.backbone(model.preprocess_image(inputs).tensor)
    features = [features[name] for name in model.head_in_features]
    logits, deltas = (
        [x.unflatten(1, (6, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]
        for levels in model.head(features)
    )
    assert assignment.normalizer == 2 * num_pos
    with EventStorage():
        theirs = stock.train().losses(
            stock.anchor_generator(features), logits, list(assignment.labels), deltas, list(assignment.boxes)
        )
    for name, loss in losses.items():
        # Detectron2's running mean starts at 100 and takes in a tenth of the batch.
        expected = theirs[name] * (90 + 0.1 * 2 * num_pos) / (2 * num_pos)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_cells_of_batch_padding_are_ignored(model):
    small = image_input(50, 62, [[4, 4, 40, 44]], [1])
    anchors, assignment = _assign(model, [image_input(128, 160, [[8, 8, 100, 90]], [0]), small])
    padding = ((anchors[:, :2] + anchors[:, 2:]) / 2 > 63.5).any(dim=1)  # the small image's own size is 64x64
    labels, boxes = assignment.labels, assignment.boxes
    assert (labels[1][padding] == -1).all() and (labels[0][padding] >= 0).any()
    assert (labels[1] == 1).any() and (boxes[1][labels[1] == 1] == torch.tensor([4.0, 4, 40, 44])).all()


def test_normalizer():
    """An image without a positive counts as one, ignored anchors do not count."""
    labels = torch.tensor([[0, 2, 3, -1], [3, 3, -1, -1], [1, 3, 3, 3]])
    assert Assignment(labels, boxes=torch.zeros(3, 4, 4), num_classes=3).normalizer == 2 + 1 + 1


def test_boxes_are_bounded_on_both_sides_at_inference(model):
    boxes = model.box_coder.decode(
        torch.tensor([[0.0, 0, -20, -20]]), torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([8.0])
    )
    torch.testing.assert_close(boxes, torch.tensor([[49.2, 49.2, 50.8, 50.8]]))


def test_weight_of_the_box_loss(model):
    doubled = copy.deepcopy(model)
    doubled.criterion = dataclasses.replace(model.criterion, box_loss_weight=2.0)
    expected, actual = _losses(model, batch())[0], _losses(doubled, batch())[0]
    assert torch.equal(actual["loss_box_reg"], 2 * expected["loss_box_reg"])
    assert torch.equal(actual["loss_cls"], expected["loss_cls"])


def test_distributions_need_a_loss_of_boxes():
    with pytest.raises(UserError, match="RETINANET.BBOX_REG_LOSS_TYPE is 'smooth_l1'; choose from giou"):
        build(detector_cfg("OpenMMLabRetinaNet", RETINANET__REG_MAX=16))
