"""Figures of several panels, drawn without a screen."""

from __future__ import annotations

from ..errors import UserError


def new_figure(rows: int, columns: int, *, width: float, height: float):
    """A matplotlib figure and its panels, an array (rows, columns).

    Args:
        width, height: of a panel, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Pictures are drawn with matplotlib; run `pip install matplotlib`.") from None
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
