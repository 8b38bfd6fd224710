"""Figures of several panels, drawn without a screen."""

from __future__ import annotations

from ...errors import UserError


def blank_figure(*, width: float, height: float, layout: str | None = None):
    """A matplotlib figure without panels.

    Args:
        width, height: in inches.
        layout: matplotlib's layout engine; None for panels that are placed by hand.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Pictures are drawn with matplotlib; run `pip install matplotlib`.") from None
    return Figure(figsize=(width, height), layout=layout)


def new_figure(rows: int, columns: int, *, width: float, height: float):
    """A matplotlib figure and its panels, an array (rows, columns).

    Args:
        width, height: of a panel, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = blank_figure(width=width * columns, height=height * rows, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
