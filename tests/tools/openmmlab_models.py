"""Random detectors in OpenMMLab's layout, run by plain functions on their state dicts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

State = dict[str, torch.Tensor]
Maps = list[torch.Tensor]

NUM_CLASSES, CHANNELS, NUM_CONVS = 3, 32, 2
# Detector -> names of its last convolutions, norm of its towers, anchors, box outputs of an anchor.
HEADS = {
    "retinanet": ("retina", "", 9, 4),
    "retinanet_dist": ("retina", "", 9, 4 * 17),
    "fcos": ("conv", "gn", 1, 4),
    "fcos_old_names": ("fcos", "gn", 1, 4),
    "fcos_dist": ("conv", "gn", 1, 4 * 17),
    "atss": ("atss", "gn", 1, 4),
    "atss_bn": ("atss", "bn", 1, 4),
    "atss_dist": ("atss", "gn", 1, 4 * 17),
    "gfl": ("gfl", "gn", 1, 4 * 17),
    "gflv2": ("gfl", "gn", 1, 4 * 9),
}


def resnet(name: str, caffe: bool = False) -> nn.Module:
    """torchvision's, with random statistics; Caffe's layout has the stride in the first 1x1 convolution."""
    model = getattr(torchvision.models, name)().eval()
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    if caffe:
        for module in model.modules():
            if isinstance(module, torchvision.models.resnet.Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return model


def resnet_state(model: nn.Module) -> State:
    state = model.state_dict()
    return {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}


@torch.no_grad()
def resnet_features(model: nn.Module, x: torch.Tensor) -> Maps:
    """C2 to C5."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


SWIN = {"embed_dim": 16, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 4, 8], "window_size": [4, 4]}


class UnfoldMerging(nn.Module):
    """Patch merging that concatenates channel-major, as ``F.unfold`` does; modules as torchvision's."""

    def __init__(self, dim: int, norm_layer) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, _ = x.shape
        patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(patches)).view(n, h // 2, w // 2, -1)


def swin() -> nn.Module:
    """The Swin Transformer SWIN with OpenMMLab's patch merging, and the norms of its last three outputs."""
    options = {"patch_size": [4, 4], "downsample_layer": UnfoldMerging, **SWIN}
    model = torchvision.models.SwinTransformer(**options).eval()
    model.norms = nn.ModuleList(nn.LayerNorm(SWIN["embed_dim"] * 2**stage) for stage in range(1, 4))
    for parameter in model.parameters():  # no affine map is the identity, no bias 0
        parameter.data += torch.randn_like(parameter) / 10
    return model


_SWIN_NAMES = {"attn.rel": "attn.w_msa.rel", "attn.qkv": "attn.w_msa.qkv", "attn.proj": "attn.w_msa.proj"}
_SWIN_NAMES.update({"mlp.0": "ffn.layers.0.0", "mlp.3": "ffn.layers.1"})


def swin_state(model: nn.Module) -> State:
    state: State = {}
    for name, value in model.state_dict().items():
        part, *rest = name.split(".")
        if part == "norms":
            state[f"backbone.norm{int(rest[0]) + 1}.{rest[1]}"] = value
        elif part == "features":
            layer, inner = int(rest[0]), ".".join(rest[1:])
            for old, new in _SWIN_NAMES.items():
                inner = inner.replace(old, new)
            if layer == 0:
                renamed = {"0": "patch_embed.projection", "2": "patch_embed.norm"}[rest[1]] + f".{rest[2]}"
            elif layer % 2:
                renamed = f"stages.{layer // 2}.blocks.{inner}"
            else:
                renamed = f"stages.{layer // 2 - 1}.downsample.{inner}"
            if name.endswith("relative_position_index"):
                cells = math.prod(SWIN["window_size"])
                value = value.view(cells, cells)
            state[f"backbone.{renamed}"] = value
    return state


@torch.no_grad()
def swin_features(model: nn.Module, x: torch.Tensor) -> Maps:
    """C3 to C5."""
    features = []
    for index, layer in enumerate(model.features):
        x = layer(x)
        if index in (3, 5, 7):
            features.append(model.norms[len(features)](x).permute(0, 3, 1, 2))
    return features


def _conv(state: State, name: str, out_channels: int, in_channels: int, size: int, bias: bool = True) -> None:
    state[f"{name}.weight"] = torch.randn(out_channels, in_channels, size, size) / (in_channels**0.5 * size)
    if bias:
        state[f"{name}.bias"] = torch.randn(out_channels) / 10


def neck_state(in_channels: list[int], p6_channels: int = 0, channels: int = CHANNELS) -> State:
    """``p6_channels``: input of P6's convolution; 0 for none, as in a two-stage detector."""
    state: State = {}
    for index, of_level in enumerate(in_channels):
        _conv(state, f"neck.lateral_convs.{index}.conv", channels, of_level, 1)
        _conv(state, f"neck.fpn_convs.{index}.conv", channels, channels, 3)
    if p6_channels:
        _conv(state, "neck.fpn_convs.3.conv", channels, p6_channels, 3)
        _conv(state, "neck.fpn_convs.4.conv", channels, channels, 3)
    return state


def neck_features(state: State, inputs: Maps, relu: bool = False) -> Maps:
    """P2 to P6 or P3 to P7; ``relu``: in front of P7."""

    def conv(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        return F.conv2d(x, state[f"neck.{name}.conv.weight"], state[f"neck.{name}.conv.bias"], **options)

    laterals = [conv(f"lateral_convs.{index}", x) for index, x in enumerate(inputs)]
    for index in range(len(laterals) - 1, 0, -1):
        finer = laterals[index - 1]
        laterals[index - 1] = finer + F.interpolate(laterals[index], finer.shape[2:])
    outputs = [conv(f"fpn_convs.{index}", x, padding=1) for index, x in enumerate(laterals)]
    if "neck.fpn_convs.3.conv.weight" not in state or len(inputs) == 4:
        return [*outputs, outputs[-1][:, :, ::2, ::2]]
    on_output = state["neck.fpn_convs.3.conv.weight"].shape[1] == outputs[-1].shape[1]
    p6 = conv("fpn_convs.3", outputs[-1] if on_output else inputs[-1], stride=2, padding=1)
    return [*outputs, p6, conv("fpn_convs.4", p6.relu() if relu else p6, stride=2, padding=1)]


def head_state(detector: str) -> State:
    prefix, norm, anchors, box_dim = HEADS[detector]
    state: State = {}
    for tower in ("cls_convs", "reg_convs"):
        for index in range(NUM_CONVS):
            name = f"bbox_head.{tower}.{index}"
            _conv(state, f"{name}.conv", CHANNELS, CHANNELS, 3, bias=not norm)
            if norm:
                state[f"{name}.{norm}.weight"] = torch.rand(CHANNELS) + 0.5
                state[f"{name}.{norm}.bias"] = torch.randn(CHANNELS) / 10
            if norm == "bn":
                state[f"{name}.bn.running_mean"] = torch.randn(CHANNELS) / 10
                state[f"{name}.bn.running_var"] = torch.rand(CHANNELS) + 0.5
                state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    num_scores = NUM_CLASSES + (detector == "gflv2")
    _conv(state, f"bbox_head.{prefix}_cls", anchors * num_scores, CHANNELS, 3)
    _conv(state, f"bbox_head.{prefix}_reg", anchors * box_dim, CHANNELS, 3)
    if prefix in ("conv", "fcos", "atss"):
        _conv(state, f"bbox_head.{prefix}_centerness", 1, CHANNELS, 3)
    if prefix != "retina":
        for level in range(5):
            state[f"bbox_head.scales.{level}.scale"] = torch.tensor(0.5 + level / 10)
    if detector == "gflv2":
        _conv(state, "bbox_head.reg_conf.0", 64, 4 * 5, 1)
        _conv(state, "bbox_head.reg_conf.2", 1, 64, 1)
    if box_dim > 4:
        state["bbox_head.integral.project"] = torch.arange(box_dim / 4)
    return state


def head_outputs(state: State, detector: str, maps: Maps, centerness_on: str = "cls") -> dict[str, Maps]:
    """Raw class and box maps (and centerness, and GFLv2's quality) of each level, in OpenMMLab's order."""
    prefix, norm, _, _ = HEADS[detector]
    outputs: dict[str, Maps] = {}
    for level, x in enumerate(maps):
        ends = {}
        for tower in ("cls", "reg"):
            y = x
            for index in range(NUM_CONVS):
                name = f"bbox_head.{tower}_convs.{index}"
                y = F.conv2d(y, state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias"), padding=1)
                affine = state.get(f"{name}.{norm}.weight"), state.get(f"{name}.{norm}.bias")
                if norm == "gn":
                    y = F.group_norm(y, 32, *affine)
                if norm == "bn":
                    statistics = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
                    y = F.batch_norm(y, *statistics, *affine)
                y = y.relu()
            ends[tower] = y
        for part in ("cls", "reg", "centerness"):
            name = f"bbox_head.{prefix}_{part}"
            if f"{name}.weight" in state:
                tower = part if part != "centerness" else {"cls": "cls", "box": "reg"}[centerness_on]
                y = F.conv2d(ends[tower], state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
                scale = state.get(f"bbox_head.scales.{level}.scale") if part == "reg" else None
                outputs.setdefault(part, []).append(y if scale is None else y * scale)
        if detector == "gflv2":
            outputs.setdefault("quality", []).append(_quality(state, outputs["reg"][-1]))
    return outputs


def _quality(state: State, box_logits: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W): 1x1 convolutions over each side's four highest probabilities and their mean."""
    statistics = []
    for side in box_logits.chunk(4, dim=1):
        highest = side.softmax(dim=1).sort(dim=1, descending=True).values[:, :4]
        statistics += [highest, highest.mean(dim=1, keepdim=True)]
    hidden = torch.cat(statistics, dim=1)
    for index in (0, 2):
        name = f"bbox_head.reg_conf.{index}"
        hidden = F.conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"])
        hidden = hidden.relu() if index == 0 else hidden.sigmoid()
    return hidden


def two_stage_state(fc_dim: int = 16, pooled: int = 7, agnostic: bool = False) -> State:
    state: State = {}
    _conv(state, "rpn_head.rpn_conv", CHANNELS, CHANNELS, 3)
    _conv(state, "rpn_head.rpn_cls", 3, CHANNELS, 1)
    _conv(state, "rpn_head.rpn_reg", 12, CHANNELS, 1)
    for name, shape in (
        ("shared_fcs.0", (fc_dim, CHANNELS * pooled**2)),
        ("shared_fcs.1", (fc_dim, fc_dim)),
        ("fc_cls", (NUM_CLASSES + 1, fc_dim)),
        ("fc_reg", (4 if agnostic else 4 * NUM_CLASSES, fc_dim)),
    ):
        state[f"roi_head.bbox_head.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        state[f"roi_head.bbox_head.{name}.bias"] = torch.randn(shape[0]) / 10
    return state


def two_stage_outputs(
    state: State, maps: Maps, pooled: torch.Tensor
) -> tuple[Maps, Maps, torch.Tensor, torch.Tensor]:
    """Objectness and deltas a level; class scores and deltas of RoI features (N, C, H, W)."""

    def conv(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        return F.conv2d(x, state[f"rpn_head.{name}.weight"], state[f"rpn_head.{name}.bias"], **options)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        name = f"roi_head.bbox_head.{name}"
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    hidden = [conv("rpn_conv", x, padding=1).relu() for x in maps]
    roi = linear("shared_fcs.1", linear("shared_fcs.0", pooled.flatten(start_dim=1)).relu()).relu()
    return (
        [conv("rpn_cls", x) for x in hidden],
        [conv("rpn_reg", x) for x in hidden],
        linear("fc_cls", roi),
        linear("fc_reg", roi),
    )
