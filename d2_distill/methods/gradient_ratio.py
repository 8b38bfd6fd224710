"""The ratio of each distillation term's gradient norm at the student's features to that of the student's own losses.

The value of a loss says little about its weight: what trains the student is the gradient. The log reports the ratios
every ``MODEL.DISTILL.GRADIENT_RATIO_PERIOD`` iterations, and ``MODEL.DISTILL.BALANCE "auto"`` sets the weights by them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..losses.reduction import mean_over_processes

logger = logging.getLogger(__name__)

# Rule of thumb: for ratios outside these bounds the log names the weight to change; docs/choosing.md explains them.
LOWEST, HIGHEST = 0.01, 10.0
RATIO_SCALARS = "grad_ratio"
# Without it, gradients of maps in half precision would vanish; as a power of two it changes no digit of others.
SCALE = 1024.0


def scalar_name(group: str, term: str) -> str:
    """Return the name of a scalar about a term, without "loss": Detectron2 prints scalars with it in every line."""
    return f"{group}/{term.replace('loss_', '', 1)}"


@dataclass(frozen=True)
class WeightedTerm:
    """A distillation term of one step.

    Attributes:
        name: name of the term.
        value: scalar, times its weight, but not times its schedule.
        factor: value of its schedule at this iteration.
        key: config key of its weight; "" if not known.
        is_balanced: whether ``MODEL.DISTILL.BALANCE`` sets its weight, so that there is no key to change.
    """

    name: str
    value: torch.Tensor
    factor: float
    key: str = ""
    is_balanced: bool = False


def feature_gradients(value: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a scalar to feature maps, None where there is no path.

    Parameters get no gradient, and the graph stays.
    """
    if not value.requires_grad:
        return [None] * len(features)
    return list(torch.autograd.grad(value, features, retain_graph=True, allow_unused=True))


def gradient_norm(value: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of a scalar's gradient to all feature maps together, 0 without a path; a scalar, float32."""
    gradients = feature_gradients(value * SCALE, features)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() / SCALE if squares else features[0].new_zeros((), dtype=torch.float32)


def measure_ratios(
    own_losses: Sequence[torch.Tensor], terms: Sequence[WeightedTerm], features: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return the ratio of each term's gradient norm at the feature maps to that of the sum of the student's own losses.

    Ratios ignore schedules: during a warm-up they show the value after the warm-up. The norms are averaged over the
    processes, all of which have to call this. Terms whose ratio is not finite are left out. Waits for the device.

    Args:
        own_losses: the student's losses, scalars.
        terms: the terms of this step.
        features: the student's maps (N, C, H, W), on which losses and terms depend.
    """
    norms = [gradient_norm(sum(own_losses), features), *(gradient_norm(term.value, features) for term in terms)]
    own, *others = mean_over_processes(torch.stack(norms)).tolist()
    ratios = {term.name: norm / own for term, norm in zip(terms, others)} if own else {}
    return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def report_ratios(ratios: Mapping[str, float], terms: Sequence[WeightedTerm]) -> None:
    """Log ratios, and put them as scalars called ``grad_ratio/`` and the term's name without ``loss_``."""
    storage = get_event_storage()
    for name, ratio in ratios.items():
        storage.put_scalar(scalar_name(RATIO_SCALARS, name), ratio, smoothing_hint=False)
    if ratios and comm.is_main_process():
        logger.info(
            "Gradients at the features, in parts of the detection loss's, at iteration %d: %s",
            storage.iter, "; ".join(_sentence(term, ratios[term.name]) for term in terms if term.name in ratios),
        )


def _sentence(term: WeightedTerm, ratio: float) -> str:
    text = f"{term.name} {ratio:.2g}"
    if term.factor != 1:
        text += f" (times {term.factor:.2g} by its schedule now)"
    if term.is_balanced or LOWEST <= ratio <= HIGHEST or not term.factor:
        return text
    advice = f"above {HIGHEST:g}: consider lowering" if ratio > HIGHEST else f"below {LOWEST:g}: consider raising"
    return f"{text} ({advice} {term.key or 'its weight'})"
