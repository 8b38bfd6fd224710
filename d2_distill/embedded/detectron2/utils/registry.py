"""``Registry`` of named classes, by fvcore."""

from fvcore.common.registry import Registry  # noqa: F401
