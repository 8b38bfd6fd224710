"""Fixed statistics: what is trained, what stays, whose weights fit."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.errors import UserError
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d, fix_statistics

from ..small_detectors import batch, build, detector_cfg

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norm(channels: int = 6) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.num_batches_tracked += 7
    return norm


@pytest.mark.parametrize("training", [True, False])
def test_normalises_with_the_running_statistics(training):
    torch.manual_seed(0)
    norm = batch_norm()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    mean, var, weight, bias = (
        tensor.detach().double().view(1, -1, 1, 1)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    expected = (x - mean) / (var + 1e-3).sqrt() * weight + bias
    fixed = FixedBatchNorm2d.convert(norm).train(training)
    x = x.float().to(memory_format=torch.channels_last).requires_grad_()
    before = {name: getattr(fixed, name).clone() for name in STATISTICS}
    found = fixed(x)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)

    gradient = torch.randn_like(found)
    found.backward(gradient)
    torch.testing.assert_close(x.grad, (gradient.double() / (var + 1e-3).sqrt() * weight).float())
    normalised = ((x.detach().double() - mean) / (var + 1e-3).sqrt()).float()
    for parameter, terms in ((fixed.weight, gradient * normalised), (fixed.bias, gradient)):
        torch.testing.assert_close(parameter.grad, terms.sum(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(getattr(fixed, name), value) for name, value in before.items())


def test_conversion_takes_over_parameters_and_names():
    norm = batch_norm()
    norm.bias.requires_grad_(False)
    nested = nn.ModuleDict({"sync": nn.SyncBatchNorm(4)})
    module = nn.Sequential(norm, nested, FrozenBatchNorm2d(3), nn.GroupNorm(2, 4))
    parameters, state = list(module.parameters()), dict(module.state_dict())
    converted = FixedBatchNorm2d.convert(module)
    assert converted is module
    assert [type(m) for m in (module[0], module[1]["sync"], module[2], module[3])] == [
        FixedBatchNorm2d, FixedBatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm
    ]
    assert all(ours is theirs for ours, theirs in zip(module.parameters(), parameters))
    assert not module[0].bias.requires_grad and module[0].eps == 1e-3
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    without_affine = FixedBatchNorm2d.convert(nn.BatchNorm2d(3, affine=False))
    assert without_affine.weight is None and without_affine(torch.ones(1, 3, 2, 2)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("case", ["RetinaNet", "GeneralizedRCNN"])
def test_training_changes_the_affine_map_only(case):
    """OpenMMLab's baseline: the stem and res2 frozen, the other norms' weight and bias trained."""
    keys = {"RESNETS__NORM": "BN", "FPN__NORM": "BN", "BACKBONE__FREEZE_AT": 2}
    plain = build(detector_cfg(case, **keys))
    model = build(detector_cfg(case, BACKBONE__FIXED_BN_STATISTICS=True, **keys)).train()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())

    bottom_up = model.backbone.bottom_up
    frozen = [name for name, module in bottom_up.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    assert {name.split(".")[0] for name in frozen} == {"stem", "res2"}
    fixed = [module for module in bottom_up.modules() if isinstance(module, FixedBatchNorm2d)]
    assert len(fixed) == 15  # three stages: two blocks of two, and a shortcut
    assert not any(type(module) is nn.BatchNorm2d for module in bottom_up.modules())
    # The pyramid's own norms start untrained: they learn their statistics.
    assert type(model.backbone.fpn_output3.norm) is nn.BatchNorm2d

    before = {name: value.clone() for name, value in bottom_up.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with EventStorage():
        for seed in range(2):
            optimizer.zero_grad()
            sum(model(batch(seed)).values()).backward()
            optimizer.step()
    for name, value in bottom_up.state_dict().items():
        leaf = name.rpartition(".")[2]
        trained = not name.startswith(("stem", "res2")) and leaf not in STATISTICS
        assert torch.equal(value, before[name]) != trained, name
    assert model.backbone.fpn_output3.norm.num_batches_tracked == 2
    for module in (model.eval(), model.train()):
        assert all(isinstance(norm, FixedBatchNorm2d) for norm in fixed)
    with torch.no_grad():  # the backbone computes the same in both modes
        image = torch.randn(1, 3, 64, 64)
        in_training, in_evaluation = (bottom_up.train(mode)(image)["res5"] for mode in (True, False))
    assert torch.equal(in_training, in_evaluation)


def test_detections_are_those_of_batch_norm():
    plain, model = (
        build(detector_cfg("RetinaNet", RESNETS__NORM="BN", BACKBONE__FIXED_BN_STATISTICS=fixed), 3).eval()
        for fixed in (False, True)
    )
    for ours, theirs in zip(model(batch()), plain(batch())):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) > 0 and torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@pytest.mark.parametrize("norm, freeze_at", [("FrozenBN", 0), ("BN", 5)])
def test_backbone_without_batch_norm_is_refused(norm, freeze_at):
    keys = {"RESNETS__NORM": norm, "BACKBONE__FREEZE_AT": freeze_at, "FPN__NORM": "BN"}
    with pytest.raises(UserError, match="FIXED_BN_STATISTICS is True, but .* no batch norm .*RESNETS.NORM"):
        build(detector_cfg("RetinaNet", BACKBONE__FIXED_BN_STATISTICS=True, **keys))


def test_any_backbone_can_be_fixed():
    """Not only a pyramid on a ResNet."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    fix_statistics(backbone)
    assert isinstance(backbone[1], FixedBatchNorm2d)
