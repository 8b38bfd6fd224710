from __future__ import annotations

import pytest
import torch
from detectron2.layers import (
    CNNBlockBase,
    Conv2d,
    CycleBatchNormList,
    FrozenBatchNorm2d,
    batched_nms,
    cat,
    cross_entropy,
    get_norm,
)
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_frozen_batch_norm_is_eval_batch_norm():
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(norm))[0]
    x = torch.rand(2, 4, 3, 3)
    expected = norm.eval()(x)
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(frozen(x.requires_grad_()), expected)
    assert isinstance(frozen, FrozenBatchNorm2d) and not list(frozen.parameters())


def test_frozen_batch_norm_loads_an_affine_map():
    frozen = FrozenBatchNorm2d(3)
    x = torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(frozen(x), x)
    frozen.load_state_dict({"weight": torch.full((3,), 2.0), "bias": torch.full((3,), 5.0)})
    torch.testing.assert_close(frozen(x), 2 * x + 5, rtol=1e-4, atol=1e-4)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


def test_freeze_keeps_state_dict_names():
    block = CNNBlockBase(3, 4, 2)
    block.conv = Conv2d(3, 4, 1, norm=get_norm("BN", 4))
    names = list(block.state_dict())
    assert block.freeze() is block and block.stride == 2
    assert sorted(block.state_dict()) == sorted(names)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert isinstance(block.conv.norm, FrozenBatchNorm2d)


def test_cycle_batch_norm_has_statistics_per_level():
    norm = CycleBatchNormList(2, nn.BatchNorm2d, num_features=3)
    levels = [torch.randn(4, 3, 5, 5) * 3 + 1, torch.randn(4, 3, 2, 2) - 7]
    for _ in range(300):
        for x in levels:
            norm(x)
    norm.weight.data.fill_(2.0)
    norm.eval()
    for x in levels:
        torch.testing.assert_close(norm(x), 2 * F.batch_norm(x, None, None, training=True), rtol=0, atol=0.5)
    assert sorted(name for name, _ in norm.named_parameters()) == ["bias", "weight"]
    assert "1.running_mean" in norm.state_dict()


def test_get_norm():
    assert get_norm("", 4) is None and get_norm(None, 4) is None
    assert get_norm("GN", 64).num_groups == 32
    assert get_norm(lambda channels: nn.GroupNorm(2, channels), 4).num_groups == 2
    with pytest.raises(KeyError, match="Nope"):
        get_norm("Nope", 4)


@pytest.mark.parametrize("norm", ["", "BN", "GN", "FrozenBN"])
def test_conv_of_an_empty_batch(norm):
    conv = Conv2d(4, 32, 3, padding=1, stride=2, norm=get_norm(norm, 32), activation=F.relu)
    assert conv(torch.rand(0, 4, 8, 6)).shape == (0, 32, 4, 3)
    assert conv(torch.rand(2, 4, 8, 6)).min() >= 0


def test_cross_entropy_of_nothing_keeps_the_graph():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_batched_nms_keeps_groups_apart():
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5], [0, 0, 4, 4.0]])
    assert batched_nms(boxes, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 0, 1]), 0.5).tolist() == [1, 2]


def test_cat():
    x = torch.zeros(2, 2)
    assert cat([x]) is x and cat([x, x], dim=1).shape == (2, 4)


def test_instances():
    boxes = Boxes([[0, 0, 1, 1], [1, 1, 2, 2]])
    instances = Instances((5, 6), gt_boxes=boxes, gt_classes=torch.tensor([3, 4]))
    assert instances[instances.gt_classes == 4].gt_boxes.tensor.tolist() == [[1, 1, 2, 2]]
    assert len(instances[-1]) == 1 and instances[-1].gt_classes.tolist() == [4]
    assert len(Instances.cat([instances, instances])) == 4 and Instances.cat([instances]) is instances
    with pytest.raises(IndexError):
        instances[2]
    with pytest.raises(AssertionError):
        instances.scores = torch.zeros(3)
    with pytest.raises(AttributeError, match="scores"):
        instances.scores
    with pytest.raises(NotImplementedError):
        len(Instances((5, 6)))


def test_boxes_of_nothing_and_bad_boxes():
    assert Boxes([]).tensor.shape == (0, 4) and Boxes.cat([]).tensor.shape == (0, 4)
    assert Boxes(torch.zeros(2, 4, dtype=torch.float64)).tensor.dtype == torch.float32
    with pytest.raises(AssertionError):
        Boxes(torch.rand(3, 5))
    with pytest.raises(AssertionError):
        Boxes([[0, 0, float("nan"), 1]]).clip((4, 4))


def test_image_list_keeps_gradients():
    image = torch.rand(3, 4, 5, requires_grad=True)
    ImageList.from_tensors([image, torch.rand(3, 6, 2)], 4).tensor.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))
