"""State dicts of the published MSAD code, which must fill the project's models and leave nothing over."""

from __future__ import annotations

import re

import torch
from torch import nn

from d2_distill.apps.conversion.msad import convert_msad
from d2_distill.detectors.building import build_detector
from d2_distill.engine.setup import load_config

from ...small_detectors import CONFIGS
from ..cases import Case


def build(name: str) -> nn.Module:
    folder = CONFIGS / "msad" / "reference"
    return build_detector(load_config(str(folder / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"]))


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def check_inventory(case: Case) -> None:
    models = case.data["models"]
    recorded, of_student = models["TFCOS_slimmable_w0.25"], models["SFCOS_slimmable_w0.25"]
    state = {name: torch.empty(shape, device="meta") for name, shape in recorded["state_dict"].items()}

    teacher = build("fcos_SLR25_FPN_1x_ms_teacher")
    conversion = convert_msad(state, teacher, "the recording")
    assert shapes(conversion.state_dict) == shapes(teacher.state_dict())
    others = [name for name in state if re.search(r"\.bn\.[1-3]\.", name)]
    assert sorted(conversion.dropped) == sorted(others)
    assert len(conversion.state_dict) == len(state) - len(others)
    assert_trainable(teacher, recorded)

    student = build("fcos_SLR25_FPN_1x_ms_student")
    copies = {f"S{name[1:]}": value for name, value in state.items() if name.startswith("T_")}
    assert of_student["state_dict_prefixes"] == sorted({name.split(".")[0] for name in (*state, *copies)})
    conversion = convert_msad({**state, **copies}, student, "the recording")
    assert shapes(conversion.state_dict) == shapes(student.state_dict())
    dropped = [f"S{name[1:]}" for name in others]
    dropped += [f"S_backbone.top_block.p7.{leaf}" for leaf in ("weight", "bias")]
    assert sorted(conversion.dropped) == sorted([*state, *dropped])
    assert_trainable(student, of_student)

    plain = build("fcos_R_50_FPN_1x_ms_teacher")
    assert_trainable(plain, models["TFCOS_R50"])
    assert sum(p.numel() for p in plain.parameters()) == models["TFCOS_R50"]["total_params"]


def assert_trainable(model: nn.Module, recorded: dict) -> None:
    """As many parameters as have a gradient there; none that has not."""
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) == recorded["num_trainable"] - recorded["num_without_grad"]


CHECKS = {"parameter_inventory": check_inventory}
