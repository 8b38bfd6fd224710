"""A small test set for runs to be compared on."""

from __future__ import annotations

import pytest

from ..data.small_sets import write_coco


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Keys below DATASETS: five images of two classes."""
    row = write_coco(tmp_path_factory.mktemp("compared"), sizes=((48, 40), (40, 48), (48, 48), (44, 40), (48, 40)))
    return {"COCO": (row,), "TEST": (row[0],)}
