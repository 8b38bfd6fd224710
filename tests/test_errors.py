from __future__ import annotations

import pytest

from d2_distill.apps.command_line.progress import Progress
from d2_distill.errors import UserError, reported


@pytest.mark.parametrize(
    "error, status",
    [
        (UserError("KEY is 3; set it to 4."), "error: KEY is 3; set it to 4."),
        (FileExistsError(17, "No", "a"), "error: a cannot be used (No); name another path, or fix this one."),
        (OSError("the device has gone"), "error: the device has gone"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_reported(error, status):
    with pytest.raises(SystemExit) as end, reported(), Progress() as progress:
        progress("working: 1 of 2")
        raise error
    assert end.value.code == status


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"), reported():
        raise ValueError("a bug")
