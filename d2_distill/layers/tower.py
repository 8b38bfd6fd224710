"""A head's tower that can be run from any place in it to any later one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn


class Tap(NamedTuple):
    """A place in a tower: after ``position`` blocks; 0 is the feature map that the tower reads.

    With ``activated`` False it lies before the activation of the last of these blocks.
    """

    position: int
    activated: bool = True


class Tower:
    """A head branch of n blocks (convolution, norm, activation), a view of layers that keep their state-dict names.

    A block is a convolution and all that follows it up to the next one; its last layer is its activation.

    Args:
        layers: the layers in their order, e.g. an ``nn.Sequential``; anything with ``out_channels`` is a convolution.

    Raises:
        ValueError: the layers do not begin with a convolution, or a block ends in its convolution.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        starts = [index for index, layer in enumerate(self.layers) if hasattr(layer, "out_channels")]
        self._ends = [0, *starts[1:], len(self.layers)] if self.layers else [0]
        if self.layers and (starts[:1] != [0] or any(hasattr(self.layers[end - 1], "out_channels") for end in self._ends[1:])):
            raise ValueError("A tower consists of blocks that begin with a convolution and end in an activation.")

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def end(self) -> Tap:
        return Tap(len(self))

    def run(self, x: torch.Tensor, start: Tap = Tap(0), stop: Tap | None = None) -> torch.Tensor:
        """Take a feature (N, C, H, W) from the tap ``start`` to that at ``stop``, by default the tower's end."""
        for layer in self.layers[self._depth(start) : self._depth(stop or self.end)]:
            x = layer(x)
        return x

    def run_through(self, x: torch.Tensor, stops: Iterable[Tap], start: Tap = Tap(0)) -> dict[Tap, torch.Tensor]:
        """Take a feature from ``start`` through all ``stops`` and return what it is at each."""
        found = {}
        for stop in sorted(stops):
            x = found[stop] = self.run(x, start, stop)
            start = stop
        return found

    def resumed(self, tap: Tap) -> Tap:
        """Where a feature that was changed at ``tap`` goes on.

        It goes through a ReLU again, which leaves what it made as it is and keeps changed features non-negative; any
        other activation would act twice.
        """
        if tap.activated and tap.position and isinstance(self.layers[self._ends[tap.position] - 1], nn.ReLU):
            return Tap(tap.position, activated=False)
        return tap

    def _depth(self, tap: Tap) -> int:
        """Number of layers before a tap."""
        return self._ends[tap.position] - (not tap.activated)

    def out_channels(self, position: int) -> int:
        """Channels after ``position`` >= 1 blocks."""
        return self.layers[self._ends[position - 1]].out_channels
