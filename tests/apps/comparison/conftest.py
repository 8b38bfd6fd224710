"""The test set that runs are compared on."""

from __future__ import annotations

import pytest

from .small_runs import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("compared"))
