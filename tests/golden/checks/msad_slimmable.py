"""Slimmable networks of the published MSAD code: one width cut out of the weights of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import torch
from detectron2.layers import get_norm
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torchvision.models._utils import _make_divisible
from torchvision.models.mobilenetv2 import InvertedResidual

from d2_distill.backbones.slimmable import Slimmable
from d2_distill.checkpoint.slimmable import is_slimmable, of_one_width
from d2_distill.config.keys import get_distill_cfg

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient
from ..openmmlab import set_keys


class OneLayer(Slimmable):
    """A network that is nothing but what the files call ``features.0``."""

    def __init__(self, layer: nn.Module, width_index: int) -> None:
        super().__init__()
        self.layer = layer
        self.width_index = width_index

    def layers(self):
        yield "layer", self.layer


def load_slice(network: Slimmable, state: dict[str, torch.Tensor]) -> None:
    """Every tensor but the counters of batch norms, which are not recorded."""
    missing, unexpected = network.load_state_dict(of_one_width(state, network), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


def published(case: Case, prefix: str, new_prefix: str = "") -> dict[str, torch.Tensor]:
    """Recorded weights below a prefix, in single precision."""
    return {
        new_prefix + name[len(prefix) :]: case.tensor(name).float() for name in case.arrays if name.startswith(prefix)
    }


def norm_of(text: str, channels: int) -> nn.Module:
    """Our batch norm, which has the recorded options, "BN eps 1e-5 momentum 0.1"."""
    name, _, eps, _, momentum = text.split()
    norm = get_norm(name, channels)
    assert (norm.eps, norm.momentum) == (float(eps), float(momentum))
    return norm


def assert_widths(channels: Sequence[int], widths: Sequence[float], rounded: Callable[[float], int]) -> None:
    """The channels at each width, of which the last is 1, are those of the whole network times the width."""
    assert list(channels) == [rounded(channels[-1] * width) for width in widths] and widths[-1] == 1


def check_conv(case: Case) -> None:
    params = case.data["params"]
    state = {
        "features.0.0.weight": case.tensor("conv.weight").float(),
        **published(case, "sbn.", "features.0.1."),
    }
    assert is_slimmable(state)
    assert_widths(params["out_channels_list"], params["width_mult_list"], int)
    channels = zip(params["in_channels_list"], params["out_channels_list"], params["groups_list"])
    for index, (in_channels, out_channels, groups) in enumerate(channels):
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            params["kernel"],
            params["stride"],
            params["padding"],
            groups=groups,
            bias=params["bias"],
        )
        norm = norm_of(params["norm"], out_channels)
        load_slice(OneLayer(nn.Sequential(conv, norm), index), state)
        x = conv(case.tensor(f"x_{index}"))
        assert_recorded(case, f"conv_out_{index}", x)
        assert_recorded(case, f"bn_eval_{index}", norm.eval()(x))
        assert_recorded(case, f"bn_train_{index}", norm.train()(x))
        assert_recorded(case, f"bn_train_running_mean_{index}", norm.running_mean)
        assert_recorded(case, f"bn_train_running_var_{index}", norm.running_var)
        # The slice has all of the gradient that the whole weight has in the published code.
        x.square().sum().backward()
        whole = torch.zeros_like(state["features.0.0.weight"])
        whole[tuple(slice(size) for size in conv.weight.shape)] = conv.weight.grad
        assert_recorded_gradient(case, f"conv_wgrad_of_sumsq_{index}", whole)


def check_block(
    case: Case, make: Callable[[int, int, int], nn.Module], rounded: Callable[[float], int]
) -> None:
    params, widths = case.data["params"], list(case.data["params"]["width_mult_list"])
    for channels in (params["inp"], params["outp"]):
        assert_widths(channels, widths, rounded)
    for index, channels in enumerate(zip(params["inp"], params["outp"])):
        block = make(*channels, params["stride"]).eval()
        load_slice(OneLayer(block, index), published(case, "w.", "features.0."))
        assert_recorded(case, f"y_{index}", block(case.tensor(f"x_{index}")))


def check_bottleneck(case: Case) -> None:
    assert case.data["params"]["expand_ratio"] is None
    check_block(
        case,
        lambda inp, out, stride: BottleneckBlock(inp, out, bottleneck_channels=out // 4, stride=stride, norm="BN"),
        int,
    )


def check_inverted_residual(case: Case) -> None:
    expansion = case.data["params"]["expand_ratio"]
    check_block(
        case,
        lambda inp, out, stride: InvertedResidual(inp, out, stride, expansion, nn.BatchNorm2d),
        lambda channels: _make_divisible(channels, 8),
    )


def slimmable_cfg(builder: str, width: float, widths: Sequence[float], **settings: Any):
    """
    Args:
        settings: config keys below MODEL, with "_" for the first dot.
    """
    cfg = get_distill_cfg()
    set_keys(cfg, {
        "BACKBONE.NAME": f"build_slimmable_{builder}_fpn_backbone",
        "BACKBONE.FREEZE_AT": 0,
        "SLIMMABLE.WIDTH_MULT": width,
        "SLIMMABLE.WIDTH_MULT_LIST": list(widths),
        "FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        **{key.replace("_", ".", 1): value for key, value in settings.items()},
    })
    return cfg


def check_r50_fpn(case: Case) -> None:
    params = case.data["params"]
    widths = list(params["width_mult_list"])
    for index, width in enumerate(widths):
        cfg = slimmable_cfg(
            "resnet",
            width,
            widths,
            SLIMMABLE_DEPTH=params["depth"],
            FPN_OUT_CHANNELS=params["fpn_out_channels"],
            FPN_FUSE_TYPE=params["fuse_type"],
            FPN_NORM=params["fpn_norm"],
            FPN_TOP_BLOCK_IN_FEATURE="res5",
            FPN_TOP_BLOCK_RELU=True,
        )
        backbone = build_backbone(cfg).eval()
        load_slice(backbone.bottom_up, published(case, "bottom_up."))
        fpn = published(case, f"fpn{index}.")
        assert all(name in fpn for name in backbone.state_dict() if not name.startswith("bottom_up."))
        assert not backbone.load_state_dict(fpn, strict=False).unexpected_keys
        x = case.tensor("x")
        with torch.no_grad():
            # The recorded res1 is in front of the pooling.
            outputs = {"res1": backbone.bottom_up.stem.conv1(x).relu(), **backbone.bottom_up(x), **backbone(x)}
        recorded = {name for name in case.arrays if name.startswith(f"out{index}.")}
        assert recorded == {f"out{index}.{name}" for name in outputs}
        for name, output in outputs.items():
            assert_recorded(case, f"out{index}.{name}", output)


def _stages(builder: str, width: float, widths: Sequence[float]) -> tuple[dict[str, int], dict[str, int]]:
    """Channels and strides of res1, which is in front of any pooling, to res5."""
    bottom_up = build_backbone(slimmable_cfg(builder, width, widths)).bottom_up
    first = next(module for module in bottom_up.modules() if isinstance(module, nn.Conv2d))
    shapes = bottom_up.output_shape().items()
    channels = {"res1": first.out_channels, **{name: shape.channels for name, shape in shapes}}
    return channels, {"res1": first.stride[0], **{name: shape.stride for name, shape in shapes}}


def check_channel_tables(case: Case) -> None:
    resnets = {float(name.rpartition("_")[2]): x for name, x in case.data["slimmable_r50_output_shape"].items()}
    for width, recorded in resnets.items():
        channels, strides = _stages("resnet", width, list(resnets))
        assert channels == recorded and list(strides.values()) == [2, 4, 8, 16, 32]
    mobilenets = {float(width): x for width, x in case.data["slimmable_mobilenetv2"].items()}
    whole, _ = _stages("mobilenet_v2", 1.0, [1.0])
    for width, recorded in mobilenets.items():
        channels, strides = _stages("mobilenet_v2", width, list(mobilenets))
        assert recorded["actual"] == channels and recorded["actual_stride"] == strides
        # The reference's own table does not round to multiples, as its layers do.
        declared = {name: int(channels * width) for name, channels in whole.items()}
        assert recorded["declared_by_reference"] == declared
    for channels, table in case.data["make_divisible_of_channels_times_width"].items():
        for width, rounded in table.items():
            # torchvision's layers have 8 channels at least; the published rounding has no such bound.
            assert rounded == _make_divisible(int(channels) * float(width), 8, min_value=1), (channels, width)


CHECKS = {
    "channel_tables": check_channel_tables,
    "slimmable_bottleneck": check_bottleneck,
    "slimmable_conv": check_conv,
    "slimmable_invres": check_inverted_residual,
    "slimmable_r50_fpn": check_r50_fpn,
}
