"""Any network of timm that gives features of strides 4 to 32, by its name."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError
from ..layers.deformable import DeformableConv2d
from ..layers.fixed_batch_norm import freeze_batch_norms, has_batch_norms, synchronise
from .pyramid import build_pyramid, pyramid_features
from .torchvision_trunk import require_three_channels

T = TypeVar("T")
LEVELS = (2, 3, 4, 5)
NORMS = ("BN", "SyncBN", "FrozenBN")
_PROBE_SIZE = (64, 96)  # of an image on which the features' sizes are checked


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.TIMM = CfgNode()
    # The network, such as "mobilenetv4_conv_small": any whose features_only=True has features of strides 4, 8, 16, 32.
    # Its weights: MODEL.WEIGHTS "timm://mobilenetv4_conv_small", or a file.
    node.NAME = ""
    # "BN" leaves the network's norms as they are; "SyncBN" and "FrozenBN" exchange its batch norms.
    node.NORM = "BN"
    # Stochastic depth of the last block, if the network has it; it rises from 0.
    node.DROP_PATH_RATE = 0.0
    # Whether the 3x3 convolutions of res2, res3, res4 and res5 are deformable.
    node.DEFORM_ON_PER_STAGE = [False, False, False, False]
    # Deformable convolutions of version 2, which also weight their points.
    node.DEFORM_MODULATED = False


def import_timm(key: str) -> ModuleType:
    """
    Args:
        key: the config key that asks for it.

    Raises:
        UserError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{key} needs timm ({error}); install it: pip install 'timm>=1.0.7'.") from error
    return timm


class TimmTrunk(Backbone):
    """A network of timm; modules below ``body`` are named as in its ``features_only`` form.

    Args:
        name: timm's of the network; a tag of weights after a dot says nothing here.
        norm: "BN", "SyncBN" or "FrozenBN", see ``MODEL.TIMM.NORM``.
        drop_path_rate: stochastic depth in training; frozen stages have none.
        deform_on_per_stage: of res2 to res5, whether 3x3 convolutions are deformable.
        deform_modulated: version 2 of these.
        out_features: of "res2" to "res5", fine to coarse; resK is the last feature of stride 2**K.
        freeze_at: as ``MODEL.BACKBONE.FREEZE_AT``: 1 is what comes before res2, 2 also res2, ...

    Raises:
        UserError: timm is missing or has no such network, or the network lacks what is asked for.
    """

    def __init__(
        self,
        name: str,
        *,
        norm: str,
        drop_path_rate: float,
        deform_on_per_stage: Sequence[bool],
        deform_modulated: bool,
        out_features: Sequence[str],
        freeze_at: int,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise UserError(f"MODEL.TIMM.NORM is {norm!r}; choose one of {', '.join(NORMS)}.")
        self.architecture = name.split(".")[0]
        self._out_features = list(out_features)
        indices = [_index(self.architecture, 2 ** int(each[len("res") :])) for each in self._out_features]
        options = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.body = _create(self.architecture, out_indices=tuple(indices), **options)
        info = self.body.feature_info
        self._out_feature_strides = dict(zip(self._out_features, info.reduction()))
        self._out_feature_channels = dict(zip(self._out_features, info.channels()))
        self._channels_last = str(getattr(getattr(self.body, "output_fmt", None), "value", "NCHW")) == "NHWC"
        self._require_maps()
        self.train()

        if any(deform_on_per_stage):
            self._deform(deform_on_per_stage, modulated=deform_modulated)
        if norm != "BN":
            if not has_batch_norms(self.body):
                raise UserError(
                    f'MODEL.TIMM.NORM is {norm!r}, but {self.architecture} has no batch norm; set it to "BN".'
                )
            self.body = (synchronise if norm == "SyncBN" else freeze_batch_norms)(self.body)
        self.freeze(freeze_at)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W) to features (N, C, H / stride, W / stride), by name."""
        features = self.body(x)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._out_features, features))

    def freeze(self, freeze_at: int) -> None:
        """Stop the training of the first stages, batch norms' statistics and stochastic depth included."""
        if freeze_at <= 0:
            return
        end = self._ends("MODEL.BACKBONE.FREEZE_AT")[min(freeze_at, len(LEVELS) + 1)]
        for name, part in self._parts()[:end]:
            part.requires_grad_(False)
            for module in part.modules():
                for key in ("drop_prob", "p"):  # of timm's DropPath and torch's Dropout
                    if isinstance(getattr(module, key, None), float):
                        setattr(module, key, 0.0)
            self._exchange(name, freeze_batch_norms(part))

    def from_classifier(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return what belongs to this network of the tensors of timm's classifier, by this network's names.

        What a deeper network has more in the same stages is among it.
        """
        own = {_dotted(name[len("body.") :]): name for name in self.state_dict()}
        parts = tuple(f"{_dotted(name)}." for name, _ in self._parts())
        return {
            own.get(_dotted(name), f"body.{name}"): value
            for name, value in tensors.items()
            if _dotted(name) in own or _dotted(name).startswith(parts)
        }

    def image_convolutions(self) -> list[str]:
        """Names of the weights of the convolutions that read the image."""
        return [
            f"body.{name}.weight"
            for name, module in self.body.named_modules()
            if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1
        ]

    def _require_maps(self) -> None:
        """Check the features of a small image, and stop the training of parameters that none of them depends on.

        Raises:
            UserError: the network does not take images of any size, or its maps are not what it declares.
        """
        parameters = list(self.body.parameters())
        image = torch.zeros(1, 3, *_PROBE_SIZE, device=parameters[0].device)
        try:
            with torch.enable_grad():
                features = list(self.eval()(image).values())
                gradients = torch.autograd.grad(sum(each.sum() for each in features), parameters, allow_unused=True)
        except Exception as error:  # whatever a network with a fixed size of images raises
            reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
            raise UserError(
                f"MODEL.TIMM.NAME: {self.architecture} does not run on images of {_PROBE_SIZE[0]}x{_PROBE_SIZE[1]} "
                f"pixels ({reason}); choose a network that takes any size divisible by 32."
            ) from error
        shapes = [tuple(each.shape[1:]) for each in features]
        expected = [
            (self._out_feature_channels[name], *(side // self._out_feature_strides[name] for side in _PROBE_SIZE))
            for name in self._out_features
        ]
        if shapes != expected:
            raise UserError(
                f"MODEL.TIMM.NAME: {self.architecture} makes maps of {shapes}, not of {expected}; choose another "
                "network."
            )
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is not None)

    def _deform(self, on_per_stage: Sequence[bool], *, modulated: bool) -> None:
        key = "MODEL.TIMM.DEFORM_ON_PER_STAGE"
        if len(on_per_stage) != len(LEVELS):
            raise UserError(f"{key} is {list(on_per_stage)}; give four values, of res2 to res5.")
        ends = self._ends(key)
        for index, wanted in enumerate(on_per_stage):
            if not wanted:
                continue
            found = [
                (f"{name}.{inner}" if inner else name, module)
                for name, part in self._parts()[ends[index + 1] : ends[index + 2]]
                for inner, module in part.named_modules()
                if type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.groups < module.in_channels
            ]
            if not found:
                raise UserError(
                    f"{key} is {list(on_per_stage)}, but res{index + 2} of {self.architecture} has no 3x3 convolution "
                    "that could be deformable; set its entry to False."
                )
            for name, module in found:
                self._exchange(name, DeformableConv2d.like(module, modulated=modulated))

    def _exchange(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.body.get_submodule(parent), child, module)

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """The network as a row of modules with their names; what a feature comes out of ends one."""
        features = [_dotted(module) for _, _, module in _feature_info(self.architecture)]

        def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
            for child, part in module.named_children():
                name = f"{prefix}{child}"
                if any(feature.startswith(f"{_dotted(name)}.") for feature in features):
                    yield from walk(f"{name}.", part)
                else:
                    yield name, part

        return list(walk("", self.body))

    def _ends(self, key: str) -> list[int]:
        """Numbers of parts up to the end of nothing, of what comes before res2, and of each of res2 to res5.

        Raises:
            UserError: the network does not tell where its stages end; the message names ``key``.
        """
        names = [_dotted(name) for name, _ in self._parts()]
        features = _feature_info(self.architecture)
        ends = {stride: names.index(_dotted(module)) + 1 for _, stride, module in features if _dotted(module) in names}
        if not all(2**level in ends for level in LEVELS):
            raise UserError(
                f"{key}: timm does not tell where the stages of {self.architecture} end; set it to 0, or False for all."
            )
        return [0, ends.get(2, ends[4] - 1), *(ends[2**level] for level in LEVELS)]


def _dotted(name: str) -> str:
    """A module's or tensor's name such that those of classifiers and of their features_only forms agree."""
    name = name[len("model.") :] if name.startswith("model.") else name
    return re.sub(r"^(\w*[A-Za-z])_(\d+)(?=\.|$)", r"\1.\2", name)


def _create(name: str, **options) -> nn.Module:
    """
    Raises:
        UserError: timm has no such network, or none with features.
    """
    timm = import_timm("MODEL.TIMM.NAME")
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(
            f"MODEL.TIMM.NAME: timm {timm.__version__} has no model {name!r}; "
            + (f"did you mean {similar[0]}?" if similar else "timm.list_models() names all.")
        )
    try:
        return timm.create_model(name, pretrained=False, features_only=True, **options)
    except Exception as error:  # whatever the many networks of timm raise that are no trunks
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UserError(
            f"MODEL.TIMM.NAME: timm builds no features of {name} for this config ({reason}); choose another network."
        ) from error


@functools.lru_cache(maxsize=None)
def _feature_info(name: str) -> tuple[tuple[int, int, str], ...]:
    """Number, stride and module of each feature that a network gives when it is not asked for some, in their order."""
    info = _create(name).feature_info
    return tuple(zip(info.out_indices, info.reduction(), info.module_name()))


def _index(name: str, stride: int) -> int:
    """Number of the last feature of a stride.

    Raises:
        UserError: there is none.
    """
    numbers = {each: number for number, each, _ in _feature_info(name)}
    if stride not in numbers:
        strides = ", ".join(str(each) for _, each, _ in _feature_info(name))
        raise UserError(
            f"MODEL.TIMM.NAME: {name} has features of the strides {strides}, and none of {stride}; choose a network "
            "whose strides are 4, 8, 16 and 32."
        )
    return numbers[stride]


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Network of timm (``MODEL.TIMM``) with :func:`~d2_distill.backbones.build_pyramid` on it.

    Raises:
        UserError: see :class:`TimmTrunk`.
    """
    require_three_channels(input_shape)
    node = cfg.MODEL.TIMM
    if not node.NAME:
        raise UserError("MODEL.TIMM.NAME is empty; name a network of timm, such as mobilenetv4_conv_small.")
    bottom_up = TimmTrunk(
        node.NAME,
        norm=node.NORM,
        drop_path_rate=node.DROP_PATH_RATE,
        deform_on_per_stage=node.DEFORM_ON_PER_STAGE,
        deform_modulated=node.DEFORM_MODULATED,
        out_features=pyramid_features(cfg),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return build_pyramid(cfg, bottom_up)
