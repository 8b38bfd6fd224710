"""State dicts of the published MSAD code, which must fill the project's models and leave nothing over."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from d2_distill.apps.conversion.msad import convert_msad
from d2_distill.backbones.slimmable import Slimmable
from d2_distill.detectors.building import build_detector
from d2_distill.engine.setup import load_config

from ...small_detectors import CONFIGS
from ..cases import Case


def build(name: str) -> nn.Module:
    folder = CONFIGS / "msad" / "reference"
    return build_detector(load_config(str(folder / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"]))


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def parameters_of(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of a state dict that are parameters, not statistics of batch norms or constants."""
    buffers = ("running_mean", "running_var", "num_batches_tracked", "cell_anchors", "pixel_mean", "pixel_std")
    return [name for name in state if name.split(".")[-1] not in buffers]


def assert_counts(
    recorded: Mapping, state: Mapping[str, torch.Tensor], trainable: list[str], unused: list[str]
) -> None:
    """The recorded numbers are those of a state dict.

    Args:
        trainable: names that the published code trains.
        unused: those of them that have no gradient.
    """
    parameters = parameters_of(state)
    assert recorded["num_parameters_tensors"] == len(parameters)
    assert recorded["total_params"] == sum(math.prod(state[name].shape) for name in parameters)
    assert recorded["num_trainable"] == len(trainable)
    assert recorded["num_without_grad"] == len(unused)
    assert sorted(recorded["trainable_without_grad_in_a_training_step"]) == sorted(unused)


def check_inventory(case: Case) -> None:
    """Slimmable models are recorded with all widths, of which ours have one; the others have no gradient there."""
    models = case.data["models"]
    teachers = {}
    for name, recorded in models.items():
        role, architecture, width = re.fullmatch(r"([TS])FCOS_(slimmable|R50)(?:_w([\d.]+))?", name).groups()
        if architecture == "R50":
            check_plain(recorded, role)
        elif role == "T":
            teachers[width] = {key: torch.empty(list(x), device="meta") for key, x in recorded["state_dict"].items()}
            check_teacher(recorded, teachers[width], width)
    for name, recorded in models.items():
        if name.startswith("SFCOS_slimmable"):
            width = name.rpartition("_w")[2]
            check_student(recorded, teachers[width], width)


def check_plain(recorded: Mapping, role: str) -> None:
    """A model of ordinary networks is recorded by its numbers."""
    model = build(f"fcos_R_50_FPN_1x_ms_{'teacher' if role == 'T' else 'student'}")
    state = dict(model.named_parameters())
    assert_counts(recorded, state, list(state), [])
    assert_trainable(model, recorded)


def config_of(width: str, role: str) -> str:
    return f"fcos_SLR{round(100 * float(width))}_FPN_1x_ms_{role}"


def of_other_widths(state: Mapping[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Batch norms that the model does not have."""
    (network,) = (module for module in model.modules() if isinstance(module, Slimmable))
    return [name for name in state if re.search(rf"\.bn\.(?!{network.width_index}\.)\d+\.", name)]


def check_teacher(recorded: Mapping, state: Mapping[str, torch.Tensor], width: str) -> None:
    teacher = build(config_of(width, "teacher"))
    conversion = convert_msad(dict(state), teacher, "the recording")
    assert shapes(conversion.state_dict) == shapes(teacher.state_dict())
    others = of_other_widths(state, teacher)
    assert sorted(conversion.dropped) == sorted(others)
    assert len(conversion.state_dict) == len(state) - len(others)
    parameters = parameters_of(state)
    assert_counts(recorded, state, parameters, [name for name in parameters if name in set(others)])
    assert_trainable(teacher, recorded)


def check_student(recorded: Mapping, teacher_state: Mapping[str, torch.Tensor], width: str) -> None:
    """A student's state dict holds its teacher, whose backbone and head it has itself as well."""
    student = build(config_of(width, "student"))
    copies = {f"S{name[1:]}": value for name, value in teacher_state.items() if name.startswith("T_")}
    state = {**teacher_state, **copies}
    assert recorded["state_dict_prefixes"] == sorted({name.split(".")[0] for name in state})
    conversion = convert_msad(dict(state), student, "the recording")
    assert shapes(conversion.state_dict) == shapes(student.state_dict())
    dropped = [*of_other_widths(copies, student)]
    dropped += [f"S_backbone.top_block.p7.{leaf}" for leaf in ("weight", "bias")]
    assert sorted(conversion.dropped) == sorted([*teacher_state, *dropped])
    trainable = parameters_of(copies)
    assert_counts(recorded, state, trainable, [name for name in trainable if name in set(dropped)])
    assert_trainable(student, recorded)


def assert_trainable(model: nn.Module, recorded: Mapping) -> None:
    """As many parameters as have a gradient there; none that has not."""
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) == recorded["num_trainable"] - recorded["num_without_grad"]


CHECKS = {"parameter_inventory": check_inventory}
