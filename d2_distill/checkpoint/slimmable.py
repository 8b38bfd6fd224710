"""Published weights of slimmable networks, of which a detector takes one width.

The files hold a classifier: convolutions of the largest width, of which a narrower network is the leading
slice, and for each width j batch norms of its own, called ``bn.<j>``. By these they are known, not by file names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from torch import nn

from ..backbones.slimmable import Slimmable
from ..errors import UserError

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]

# Saved by DataParallel, or not.
_PREFIX = re.compile(r"^module\.")
_COUNTER = "num_batches_tracked"


def is_slimmable(state: State) -> bool:
    """Whether a state dict is that of a slimmable classifier."""
    return any(_PREFIX.sub("", name) == "features.0.1.bn.0.weight" for name in state)


def of_one_width(state: State, network: Slimmable) -> State:
    """The tensors of one network, by its names, without those that are missing or do not fit.

    Args:
        state: of a slimmable classifier, with names such as ``features.1.body.0.weight`` and
            ``features.1.body.1.bn.<j>.bias``.
    """
    others = re.compile(rf"\.bn\.(?!{network.width_index}\.)\d+\.")
    published = {
        re.sub(r"\.bn\.\d+\.", ".", _PREFIX.sub("", name)): value
        for name, value in state.items()
        if not others.search(name)
    }
    found = {}
    for module, published_module in _published_names(network).items():
        for leaf, ours in network.get_submodule(module).state_dict().items():
            if "." in leaf:  # the norm that Detectron2 has inside its convolution
                continue
            value = published.get(f"{published_module}.{leaf}")
            if value is not None and ours.dim() == 4:
                value = value[tuple(slice(size) for size in ours.shape)]
            if value is not None and value.shape == ours.shape:
                found[f"{module}.{leaf}"] = value
    return found


def _published_names(network: Slimmable) -> dict[str, str]:
    """Convolutions and norms of a network -> their modules in a file, without the number of the width."""
    names = {}
    for index, (layer_name, layer) in enumerate(network.layers()):
        weighted = [name for name, module in layer.named_modules() if hasattr(module, "weight")]
        branches: dict[str, list[str]] = {"body": [], "shortcut": []}
        for name in weighted:
            branches["shortcut" if name.startswith("shortcut") else "body"].append(name)
        for branch, members in branches.items():
            # The stem, and MobileNetV2's last layer, have one convolution and no branches.
            path = f"features.{index}" if len(weighted) == 2 else f"features.{index}.{branch}"
            for number, name in enumerate(members):  # convolution and norm by turns, then an activation
                names[f"{layer_name}.{name}"] = f"{path}.{number + number // 2}"
    return names


def fit_to_model(state: State, model: nn.Module, source: str) -> State:
    """A state dict for ``model``: of a slimmable classifier, its backbone's part; any other stays as it is.

    Args:
        source: the file, for the message.

    Raises:
        UserError: the model has no slimmable backbone.
    """
    if not is_slimmable(state):
        return state
    networks = _networks(model)
    if not networks:
        raise UserError(
            f"MODEL.WEIGHTS: {source} holds a slimmable network, but the backbone of {type(model).__name__} is "
            "none; set MODEL.BACKBONE.NAME to build_slimmable_resnet_fpn_backbone or "
            "build_slimmable_mobilenet_v2_fpn_backbone."
        )
    fitted = {
        f"{prefix}.{name}": value
        for prefix, network in networks.items()
        for name, value in of_one_width(state, network).items()
    }
    logger.info("%s: %d tensors of a slimmable network at one of its widths", source, len(fitted))
    return fitted


def require_filled(model: nn.Module, missing: Iterable[str], source: str) -> None:
    """
    Args:
        missing: names of the model's tensors that the file ``source`` did not fill.

    Raises:
        UserError: some belong to a slimmable backbone, which would be trained from scratch in part.
    """
    prefixes = tuple(f"{prefix}." for prefix in _networks(model))
    unfilled = [name for name in missing if name.startswith(prefixes) and not name.endswith(_COUNTER)]
    if unfilled:
        raise UserError(
            f"MODEL.WEIGHTS: {source} does not fill the slimmable backbone; take the weights of this network, and "
            "the DEPTH, WIDTH_MULT and WIDTH_MULT_LIST of MODEL.SLIMMABLE to which they belong "
            f"({len(unfilled)} missing or of another shape: {', '.join(unfilled)})."
        )


def _networks(model: nn.Module) -> dict[str, Slimmable]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Slimmable)}
