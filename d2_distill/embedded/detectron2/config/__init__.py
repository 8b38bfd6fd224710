"""Configuration: the YACS tree with its defaults, and ``@configurable``."""

from .config import CfgNode, configurable, get_cfg  # noqa: F401
