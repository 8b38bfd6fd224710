"""What arguments tools take."""

from __future__ import annotations

import argparse

import pytest

from d2_distill.apps.command_line.arguments import whole_number


@pytest.mark.parametrize("text", ["-1", "0", "1.5", "", "one"])
def test_whole_numbers(text):
    assert whole_number(1)("12") == 12 and whole_number(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a whole number from 1 on"):
        whole_number(1)(text)
