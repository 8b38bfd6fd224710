"""Slimmable networks of the published MSAD code: one width cut out of the weights of all."""

from __future__ import annotations

from typing import Callable

import torch
import torchvision
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from d2_distill.backbones.slimmable import Slimmable
from d2_distill.checkpoint.slimmable import is_slimmable, of_one_width
from d2_distill.config.keys import get_distill_cfg

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient


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


def check_conv(case: Case) -> None:
    params = case.data["params"]
    state = {
        "features.0.0.weight": case.tensor("conv.weight").float(),
        **published(case, "sbn.", "features.0.1."),
    }
    assert is_slimmable(state)
    channels = zip(params["in_channels_list"], params["out_channels_list"], params["groups_list"])
    for index, (in_channels, out_channels, groups) in enumerate(channels):
        conv = nn.Conv2d(
            in_channels, out_channels, params["kernel"], params["stride"], params["padding"], groups=groups, bias=False
        )
        norm = nn.BatchNorm2d(out_channels)
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


def check_block(case: Case, make: Callable[[int, int, int], nn.Module]) -> None:
    params = case.data["params"]
    for index, channels in enumerate(zip(params["inp"], params["outp"])):
        block = make(*channels, params["stride"]).eval()
        load_slice(OneLayer(block, index), published(case, "w.", "features.0."))
        assert_recorded(case, f"y_{index}", block(case.tensor(f"x_{index}")))


def check_bottleneck(case: Case) -> None:
    check_block(
        case,
        lambda inp, out, stride: BottleneckBlock(inp, out, bottleneck_channels=out // 4, stride=stride, norm="BN"),
    )


def check_inverted_residual(case: Case) -> None:
    expansion = case.data["params"]["expand_ratio"]
    check_block(case, lambda inp, out, stride: InvertedResidual(inp, out, stride, expansion, nn.BatchNorm2d))


def slimmable_cfg(builder: str, width: float, widths: tuple[float, ...], **fpn):
    cfg = get_distill_cfg()
    cfg.MODEL.BACKBONE.NAME = f"build_slimmable_{builder}_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.SLIMMABLE.WIDTH_MULT = width
    cfg.MODEL.SLIMMABLE.WIDTH_MULT_LIST = list(widths)
    cfg.MODEL.FPN.merge_from_list([item for pair in fpn.items() for item in pair])
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


def check_r50_fpn(case: Case) -> None:
    params = case.data["params"]
    for index, width in enumerate(params["width_mult_list"]):
        cfg = slimmable_cfg(
            "resnet", width, params["width_mult_list"], OUT_CHANNELS=params["fpn_out_channels"],
            TOP_BLOCK_IN_FEATURE="res5", TOP_BLOCK_RELU=True,
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


def check_channel_tables(case: Case) -> None:
    resnets = {
        float(name[len("r50_") :]): channels for name, channels in case.data["slimmable_r50_output_shape"].items()
    }
    mobilenets = {float(width): entry["actual"] for width, entry in case.data["slimmable_mobilenetv2"].items()}
    for builder, table in (("resnet", resnets), ("mobilenet_v2", mobilenets)):
        for width, channels in table.items():
            bottom_up = build_backbone(slimmable_cfg(builder, width, tuple(table))).bottom_up
            found = {name: shape.channels for name, shape in bottom_up.output_shape().items()}
            first = next(module for module in bottom_up.modules() if isinstance(module, nn.Conv2d))
            assert {"res1": first.out_channels, **found} == channels, (builder, width)
            strides = {name: shape.stride for name, shape in bottom_up.output_shape().items()}
            assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    check_divisible(case.data["make_divisible_of_channels_times_width"])


def check_divisible(table: dict[str, dict[str, int]]) -> None:
    """Rounded channels against those of torchvision's layers, which never have fewer than 8 of them."""
    ends = {"16": 1, "24": 2, "32": 4, "64": 7, "96": 11, "160": 14, "320": 17, "1280": 18}
    for width in table["16"]:
        with torch.device("meta"):
            layers = torchvision.models.MobileNetV2(width_mult=float(width)).features
        for channels, end in ends.items():
            # The last layer is not narrowed; of less than 4 channels the published rounding makes 9, not 8.
            if float(width) >= (1 if channels == "1280" else 4 / int(channels)):
                assert layers[end].out_channels == table[channels][width], (channels, width)


CHECKS = {
    "channel_tables": check_channel_tables,
    "slimmable_bottleneck": check_bottleneck,
    "slimmable_conv": check_conv,
    "slimmable_invres": check_inverted_residual,
    "slimmable_r50_fpn": check_r50_fpn,
}
