"""The region proposal network, its head and their registries."""

from .rpn import PROPOSAL_GENERATOR_REGISTRY, RPN, RPN_HEAD_REGISTRY, StandardRPNHead  # noqa: F401
