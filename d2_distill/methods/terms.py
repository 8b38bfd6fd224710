"""What the terms of methods must be: declared, named like no other loss, finite, and connected to the student."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ..errors import UserError
from .gradient_ratio import feature_gradients

KEY = "MODEL.DISTILL.METHODS"


def require_distinct_terms(terms: Mapping[str, Collection[str]]) -> None:
    """Check that no two methods have a term of the same name, of which one would replace the other.

    Args:
        terms: method -> names of the terms that it returns.

    Raises:
        UserError: two of them have.
    """
    owners: dict[str, str] = {}
    for method, names in terms.items():
        for term in names:
            if term in owners:
                raise UserError(
                    f"{KEY}: {owners[term]} and {method} both have a term {term}, so one would replace the other; "
                    "rename it in one of the two, or leave one of them out."
                )
            owners[term] = method


def require_own_names(method: str, terms: Collection[str], student_losses: Collection[str]) -> None:
    """Check that no term of a method has the name of a loss of the student, which it would replace.

    Raises:
        UserError: one has.
    """
    for term in terms:
        if term in student_losses:
            raise UserError(
                f"{KEY}: the term {term} of {method} has the name of one of the student's own losses "
                f"({', '.join(student_losses)}) and would replace it; rename the term in {method}."
            )


def require_declared(method: str, returned: Collection[str], declared: Collection[str]) -> None:
    """Check that a method returns no term without a weight.

    Raises:
        UserError: it does.
    """
    for term in returned:
        if term not in declared:
            raise UserError(
                f"{KEY}: {method} returns the term {term}, for which it has no weight (it has weights for "
                f"{', '.join(declared)}); add the term to the weights (WEIGHT_KEYS) of {method}, or rename it."
            )


def require_complete(method: str, returned: Collection[str], expected: Collection[str]) -> None:
    """Check that a method returns every term that has a weight other than 0.

    Raises:
        UserError: it does not.
    """
    missing = [term for term in expected if term not in returned]
    if missing:
        raise UserError(
            f"{KEY}: {method} does not return {', '.join(missing)}, although the weight is not 0; return the term in "
            f"{method}'s forward, or set its weight to 0."
        )


def check_value(method: str, term: str, value: torch.Tensor, features: Sequence[torch.Tensor]) -> None:
    """Check that a term is finite and that its gradient reaches the student's feature maps. Waits for the device.

    Raises:
        UserError: it is silent or broken.
    """
    if not torch.isfinite(value):
        raise UserError(
            f"{KEY}: {method} gives {term} = {value.item()} in the first steps; check the teacher's weights and the "
            "pixel statistics (INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD) of both configs."
        )
    if all(gradient is None for gradient in feature_gradients(value, features)):
        raise UserError(
            f"{KEY}: the gradient of {method}'s {term} does not reach the student's features, so it teaches nothing; "
            "leave the method out or fix it."
        )


def require_gradients(features: Sequence[torch.Tensor]) -> None:
    """Check that the student's feature maps have gradients by which weights can be balanced.

    Raises:
        UserError: none of them has.
    """
    if not any(feature.requires_grad for feature in features):
        raise UserError(
            'MODEL.DISTILL.BALANCE is "auto", but nothing below the student\'s feature maps is trained, so there are no '
            'gradients to balance; lower MODEL.BACKBONE.FREEZE_AT, or set BALANCE to "published".'
        )
