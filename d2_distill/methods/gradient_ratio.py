"""How hard each distillation term pulls at the student's features, in parts of the student's own losses.

Numbers of a loss say little about its weight: what trains the student is the gradient. The log tells its size every
``MODEL.DISTILL.GRADIENT_RATIO_PERIOD`` iterations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

logger = logging.getLogger(__name__)

# Rule of thumb: outside of these the log names the weight to change; see docs/choosing.md for where they come from.
LOWEST, HIGHEST = 0.01, 10.0
RATIO_SCALARS = "grad_ratio"
# Gradients of maps in half precision would vanish without; as a power of two it changes no digit of others.
SCALE = 1024.0


def scalar_name(group: str, term: str) -> str:
    """Name of a scalar about a term, without "loss" in it, by which Detectron2 knows what to print in every line."""
    return f"{group}/{term.replace('loss_', '', 1)}"


@dataclass(frozen=True)
class WeightedTerm:
    """A distillation term of one step.

    Attributes:
        name: of the term.
        value: scalar, times its weight, but not times its schedule.
        factor: of its schedule at this iteration.
        key: config key of its weight; "" if not known.
    """

    name: str
    value: torch.Tensor
    factor: float
    key: str = ""


def feature_gradients(value: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients of a scalar to feature maps, None where there is no path; parameters get none, and the graph stays."""
    if not value.requires_grad:
        return [None] * len(features)
    return list(torch.autograd.grad(value, features, retain_graph=True, allow_unused=True))


def gradient_norm(value: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm of the gradient of a scalar to all feature maps together; 0 where there is no path. A scalar, float32."""
    gradients = feature_gradients(value * SCALE, features)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() / SCALE if squares else features[0].new_zeros((), dtype=torch.float32)


def report_ratios(
    own_losses: Sequence[torch.Tensor], terms: Sequence[WeightedTerm], features: Sequence[torch.Tensor]
) -> None:
    """Log each term's gradient norm at the feature maps over that of the sum of the student's own losses.

    The scalars are called ``grad_ratio/`` and the term's name without ``loss_``. Weights are counted, schedules are
    not, so that the numbers of a warm-up tell what comes after it. To be called in all processes: a norm that is
    synchronised between them is so backwards, too. Each sees its own images, and the first one's ratios are logged.

    Args:
        own_losses: of the student, scalars.
        features: its maps (N, C, H, W), on which losses and terms depend.
    """
    norms = [gradient_norm(sum(own_losses), features), *(gradient_norm(term.value, features) for term in terms)]
    own, *others = torch.stack(norms).tolist()
    ratios = {term: norm / own for term, norm in zip(terms, others)} if own else {}
    ratios = {term: ratio for term, ratio in ratios.items() if math.isfinite(ratio)}
    storage = get_event_storage()
    for term, ratio in ratios.items():
        storage.put_scalar(scalar_name(RATIO_SCALARS, term.name), ratio, smoothing_hint=False)
    if ratios and comm.is_main_process():
        logger.info(
            "Gradients at the features, in parts of the detection loss's, at iteration %d: %s",
            storage.iter, "; ".join(_sentence(term, ratio) for term, ratio in ratios.items()),
        )


def _sentence(term: WeightedTerm, ratio: float) -> str:
    text = f"{term.name} {ratio:.2g}"
    if term.factor != 1:
        text += f" (times {term.factor:.2g} by its schedule now)"
    if LOWEST <= ratio <= HIGHEST or not term.factor:
        return text
    advice = f"above {HIGHEST:g}: consider lowering" if ratio > HIGHEST else f"below {LOWEST:g}: consider raising"
    return f"{text} ({advice} {term.key or 'its weight'})"
