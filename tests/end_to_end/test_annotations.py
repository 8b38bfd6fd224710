"""Each annotation file of a run is read once, in one process; what was read is checked, trained on and evaluated on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ..data.small_sets import write_voc
from .conftest import SIZES, write_scenes
from .runs import QUIET, TINY, average_precision, distiller, losses, merged, write_config

READS = Path(__file__).with_name("reads.py")
SHORT = {"SOLVER": {"MAX_ITER": 4}, "TEST": {"EVAL_PERIOD": 2}}


@pytest.fixture
def run(server, tmp_path):
    """Runs a config; returns the outcome, and how often each process has read each annotation file."""

    def run(config, *arguments, processes=1, folder="out", spoil=()):
        reads = tmp_path / f"reads_of_{folder}"
        reads.mkdir()
        path = write_config(tmp_path / "config.yaml", config)
        outcome = server.run(
            "--config-file", path, *arguments, "OUTPUT_DIR", tmp_path / folder, script=READS, processes=processes,
            READS=str(reads), SPOIL=":".join(map(str, spoil)),
        )
        return outcome, {int(path.name): Counter(path.read_text().split()) for path in reads.iterdir()}

    return run


def coco_data(folder):
    train, val = write_scenes(folder / "train"), write_scenes(folder / "val", sizes=SIZES[:5])
    return {"COCO": [train, val], "TRAIN": [train[0]], "TEST": [val[0]]}, [train[1], val[1]]


def voc_data(folder):
    """Two splits that share their files, and tell no classes."""
    _, folder, split, _, year = write_voc(folder)
    (Path(folder) / "ImageSets" / "Main" / "test.txt").write_text("1\n0")
    rows = [(f"voc_{split}", folder, split, [], year) for split in ("train", "test")]
    files = [f"{folder}/Annotations/{number}.xml" for number in range(2)]
    return {"COCO": [], "VOC": rows, "TRAIN": ["voc_train"], "TEST": ["voc_test"]}, files


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("data", [coco_data, voc_data])
def test_files_are_read_once_and_may_change_then(run, data, processes, tmp_path):
    """The two evaluations do not read them again."""
    datasets, files = data(tmp_path / "data")
    config = merged(TINY, {"DATASETS": datasets}, SHORT)
    outcome, reads = run(config, processes=processes)
    expected = outcome.succeeded()
    assert reads == {0: Counter(files)}
    found, _ = run(config, processes=processes, folder="spoilt", spoil=files)
    assert [Path(file).read_text() for file in files] == ["{", "{"]
    found.succeeded()
    assert losses(tmp_path / "spoilt") == losses(tmp_path / "out") and len(losses(tmp_path / "out")) == 4
    assert average_precision(found) == average_precision(expected)
    assert "MODEL.RETINANET.NUM_CLASSES is 2" in expected.stdout and "cat, dog" in expected.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_training_data_for_the_names_of_classes_only(run, processes, teacher, tmp_path):
    datasets, files = coco_data(tmp_path / "data")
    arguments = ("--eval-only", "MODEL.WEIGHTS", teacher.weights, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32)
    outcome, reads = run(merged(TINY, {"DATASETS": datasets}), *arguments, processes=processes, spoil=files)
    outcome.succeeded()
    assert reads == {0: Counter(files)} and average_precision(outcome)[0] > 5


def test_data_of_a_teacher_are_read_in_one_process(run, teacher, tmp_path):
    """For the names of its classes."""
    datasets, files = coco_data(tmp_path / "data")
    other = write_scenes(tmp_path / "other")
    teacher_config = write_config(
        tmp_path / "teacher.yaml", {"_BASE_": str(teacher.config), "DATASETS": {"COCO": [other], "TRAIN": [other[0]]}}
    )
    config = merged(TINY, {"DATASETS": datasets}, QUIET, SHORT, distiller(teacher_config, teacher.weights, "CrossKD"))
    outcome, reads = run(config, processes=2)
    outcome.succeeded()
    assert reads == {0: Counter([files[0], other[1]])}


PYTHON_SET = """
import json
from detectron2.data import DatasetCatalog, MetadataCatalog

def load():
    with open({log!r}, "a") as file:
        file.write("loaded ")
    with open({records!r}) as file:
        records = json.load(file)
    MetadataCatalog.get("python_set").thing_classes = ["cat", "dog"]
    return records

DatasetCatalog.register("python_set", load)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_python_code_loads_once(run, processes, tmp_path):
    """It tells the classes only when it loads."""
    _, _, images = write_scenes(tmp_path / "data")
    box = {"bbox": [4, 3, 20, 19], "bbox_mode": 0, "category_id": 1}
    records = [
        {"file_name": f"{images}/{number}.png", "width": size[0], "height": size[1], "image_id": number, "annotations": [box]}
        for number, size in enumerate(SIZES[:4])
    ]
    log, path = tmp_path / "log.txt", tmp_path / "records.txt"
    path.write_text(json.dumps(records))
    (tmp_path / "mine.py").write_text(PYTHON_SET.format(log=str(log), records=str(path)))
    own = {"IMPORTS": [str(tmp_path / "mine.py")], "DATASETS": {"TRAIN": ["python_set"]}}
    outcome, _ = run(merged(TINY, QUIET, SHORT, own, {"MODEL": {"RETINANET": {"NUM_CLASSES": 80}}}), processes=processes)
    outcome.succeeded()
    assert log.read_text() == "loaded " and "MODEL.RETINANET.NUM_CLASSES is 2" in outcome.stdout
    assert len(losses(tmp_path / "out")) == 4
