"""A pure-Python subset of Detectron2, used where the real one is not installed."""

__version__ = "0.6"
__embedded__ = True
