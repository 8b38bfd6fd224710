"""The choice of images, and pictures beside each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from d2_distill.apps.comparison.measures import Detector, images_per_second, measure_size
from d2_distill.apps.comparison.pictures import (
    GAP,
    MARGIN,
    MISSED,
    RIGHT,
    SIDE,
    TRUTH,
    WRONG,
    draw_comparison,
    most_different,
)
from d2_distill.apps.comparison.runs import read_run
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from .small_runs import write_run


@pytest.fixture(scope="module")
def detectors(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    runs = {
        "small": write_run(folder / "small", data=data, RETINANET__NUM_CONVS=1),
        "large": write_run(folder / "large", data=data, seed=5, RETINANET__NUM_CONVS=4),
    }
    return {name: Detector(read_run(path)) for name, path in runs.items()}


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    register_datasets(read_run(write_run(tmp_path_factory.mktemp("data") / "run", data=data)).cfg)
    return DatasetCatalog.get(data["TEST"][0])


def silent(text: str) -> None:
    pass


def test_images_on_which_errors_differ_most_come_first(detectors, records):
    errors = []
    for record in records:
        # without annotations every detection is an error
        errors.append(abs(len(detectors["small"].detect(record, 0.0)) - len(detectors["large"].detect(record, 0.0))))
    cleared = [{**record, "annotations": []} for record in records]
    told = []
    chosen = most_different(cleared, detectors, 0.0, 2, progress=told.append)
    numbers = [cleared.index(record) for record in chosen]
    assert sorted((errors[number] for number in numbers), reverse=True) == sorted(errors, reverse=True)[:2]
    assert told[-1] == "looking for differences: image 5 of 5"


def test_a_row_an_image_and_a_column_a_model(detectors, records):
    picture = draw_comparison(records[:2], detectors, ["cat", "dog"], 0.0, progress=silent)
    pixels = np.asarray(picture)
    # 48 x 40 and 40 x 48 pixels, each enlarged to 360; ground truth and two models
    assert picture.width == 2 * MARGIN + 3 * SIDE + 2 * GAP
    assert picture.height > 2 * MARGIN + 300 + SIDE + GAP
    body = pixels[picture.height - MARGIN - SIDE - GAP - 300 :]  # below legend and titles
    columns = [body[:, MARGIN + k * (SIDE + GAP) :][:, :SIDE] for k in range(3)]

    def count(column, color):
        return int((column == color).all(axis=2).sum())

    assert count(columns[0], TRUTH) > 100 and count(columns[1], TRUTH) == 0
    assert all(count(column, WRONG) > 100 for column in columns[1:]) and count(columns[0], WRONG) == 0
    assert sum(count(column, MISSED) + count(column, RIGHT) for column in columns[1:]) > 100


def test_detectors_are_measured_on_test_images(detectors, records):
    small, large = (measure_size(detectors[name], records[0]) for name in ("small", "large"))
    assert large.parameters > small.parameters > 0 and large.multiply_adds > small.multiply_adds > 0
    bare = measure_size(detectors["small"], None)
    assert bare.parameters == small.parameters and bare.multiply_adds is None
    told = []
    speeds = images_per_second(detectors, records[:2], progress=told.append)
    assert speeds["small"] > 0 and speeds["large"] > 0 and set(speeds) == set(detectors)
    assert told[0] == "images/s: round 1 of 22" and len(told) == 22


def test_detectors_have_the_weights_of_the_checkpoint(data, detectors):
    saved = torch.load(detectors["small"].run.checkpoint, weights_only=True)["model"]
    state = detectors["small"].model.state_dict()
    assert not detectors["small"].model.training and all(torch.equal(state[name], saved[name]) for name in saved)


def test_weights_of_another_model_are_refused(data, tmp_path):
    path = write_run(tmp_path / "run", data=data)
    other = write_run(tmp_path / "other", data=data, RETINANET__NUM_CONVS=1)
    (path / "model_final.pth").write_bytes((other / "model_final.pth").read_bytes())
    with pytest.raises(UserError, match="The run .*run: .*model_final.pth does not fit the model of its config"):
        Detector(read_run(path))
