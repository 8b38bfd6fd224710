"""Cells over the image: where they lie, how they are scaled, and what is cropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2_distill.apps.pictures.level_maps import COMMON, OWN_MAXIMUM, OWN_RANGE, LevelMaps

pytest.importorskip("matplotlib")
from d2_distill.apps.pictures.heatmaps import DIMMED, OPACITY, common_maximum, overlay, scaled  # noqa: E402

YELLOW = np.array([253, 231, 37])  # where viridis ends


def level_maps(scaling, **maps):
    return LevelMaps("title", "note", scaling, {name: torch.tensor(values) for name, values in maps.items()})


def test_cells_lie_where_their_pixels_are_and_padding_is_cropped():
    image = np.full((20, 30, 3), 100, np.uint8)
    values = np.zeros((2, 2))
    values[1, 0] = 1.0
    picture = overlay(image, values, 16, selects=True)
    assert picture.shape == image.shape
    selected = np.isclose(picture, OPACITY * YELLOW + (1 - OPACITY) * 100, atol=1).all(axis=2)
    assert selected[16:, :16].all() and selected.sum() == 4 * 16
    assert (picture[~selected] == round(DIMMED * 100)).all()


def test_what_selects_nothing_is_coloured_everywhere():
    picture = overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1)), 8, selects=False)
    assert (picture == picture[0, 0]).all() and picture[0, 0].any()


@pytest.mark.parametrize("scaling, expected", [(OWN_RANGE, [0, 0.5, 1]), (OWN_MAXIMUM, [1 / 3, 2 / 3, 1])])
def test_scalings_of_each_map(scaling, expected):
    maps = level_maps(scaling, p3=[[2.0, 4.0, 6.0, 99.0]], p4=[[1.0, 2.0, 3.0, 0.0]])
    for values in scaled(maps, (8, 24), {"p3": 8, "p4": 8}, common=1.0).values():  # the last cell is padding
        assert values.tolist() == [pytest.approx(expected)]


def test_common_scaling():
    columns = [level_maps(COMMON, p3=[list(map(float, range(100)))]), level_maps(OWN_RANGE, p3=[[1000.0]])]
    assert common_maximum(columns) == pytest.approx(98.01)
    values = scaled(columns[0], (8, 800), {"p3": 8}, common=50.0)["p3"]
    assert values[0, 25] == pytest.approx(0.5) and values.max() == 1
    assert common_maximum([columns[1]]) == 1.0


def test_an_even_map_is_low():
    assert scaled(level_maps(OWN_RANGE, p3=[[3.0, 3.0]]), (8, 16), {"p3": 8}, 1.0)["p3"].tolist() == [[0, 0]]
