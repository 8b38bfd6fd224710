"""Data sets, and runs that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..data.small_sets import write_coco, write_voc
from .runs import QUIET, RECORDER, TINY, ForkServer, distiller, write_config

SIZES = ((48, 40), (40, 48), (48, 40), (44, 40), (48, 48), (40, 48))  # the fifth image has no object
COLORS = ((250, 40, 40), (40, 250, 40))  # of the two classes


def write_scenes(folder: Path, sizes=SIZES):
    """A COCO set of dark images with a bright square of 16 x 16 in each, red cats and green dogs."""

    def move_and_paint(content):
        for index, annotation in enumerate(content["annotations"]):
            x, y = 4 + 5 * (index % 4), 3 + 4 * (index % 5)
            annotation.update(bbox=[x, y, 16, 16], area=256)
            path = folder / "images" / f"{annotation['image_id'] - 100}.png"
            pixels = np.array(Image.open(path)) // 5
            pixels[y : y + 16, x : x + 16] = COLORS[annotation["category_id"] // 10 - 1]
            Image.fromarray(pixels).save(path)

    return write_coco(folder, sizes=sizes, edit=move_and_paint)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The keys of a config that trains on six images and evaluates on five."""
    folder = tmp_path_factory.mktemp("data")
    train, val = write_scenes(folder / "train"), write_scenes(folder / "val", sizes=SIZES[:5])
    return {"DATASETS": {"COCO": [train, val], "TRAIN": [train[0]], "TEST": [val[0]]}}


@pytest.fixture(scope="session")
def voc_data(tmp_path_factory):
    row = write_voc(tmp_path_factory.mktemp("voc"))
    return {"DATASETS": {"COCO": [], "VOC": [row], "TRAIN": [row[0]], "TEST": [row[0]]}}


@dataclass
class Trained:
    """A finished run."""

    config: Path
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def teacher(server, data, runs):
    """Twice as wide as the student, and trained until it finds something."""
    folder = runs / "teacher"
    config = write_config(
        runs / "teacher.yaml", TINY, data,
        {"MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 32}}, "OUTPUT_DIR": str(folder)},
        {"SOLVER": {"IMS_PER_BATCH": 4, "MAX_ITER": 40}},
    )
    server.run("--config-file", config).succeeded()
    return Trained(config, folder)


@pytest.fixture(scope="session")
def plain(server, data, runs):
    folder = runs / "plain"
    config = write_config(runs / "plain.yaml", TINY, data, {"OUTPUT_DIR": str(folder)})
    server.run("--config-file", config).succeeded()
    return Trained(config, folder)


@pytest.fixture(scope="session")
def distilled(server, data, runs, teacher):
    folder = runs / "distilled"
    config = write_config(
        runs / "distilled.yaml", TINY, data,
        distiller(teacher.config, teacher.weights, "CrossKD", "PKD", "FeatureImitation"),
        {"OUTPUT_DIR": str(folder)},
    )
    server.run("--config-file", config).succeeded()
    return Trained(config, folder)


@pytest.fixture(scope="session")
def recorded(server, data, runs):
    """A plain run of eight iterations whose losses are recorded."""
    folder = runs / "recorded"
    config = write_config(runs / "recorded.yaml", TINY, data, QUIET)
    server.run("--config-file", config, "OUTPUT_DIR", folder, script=RECORDER).succeeded()
    return Trained(config, folder)
