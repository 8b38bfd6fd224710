"""tools/show_regions.py: a picture for each image, of any pair, trained or not; what is left out and refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..data.small_sets import write_coco, write_image
from ..small_detectors import detector_cfg, distiller_cfg, save_teacher

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import show_regions  # noqa: E402


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """Of a data set of five images, the last of which has no object."""
    sizes = ((64, 48), (48, 64), (64, 48), (64, 48), (64, 48))
    return write_coco(tmp_path_factory.mktemp("regions"), sizes=sizes, classes=("cat", "dog", "cow"))


def write(folder: Path, cfg, row) -> Path:
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN = (row,), (row[0],)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 128
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command and returns what it prints; the output folder is ``tmp_path / "out"``."""

    def run(config, *arguments):
        command = ["--config-file", config, "--output", tmp_path / "out", "--score-threshold", 0.2, *arguments]
        monkeypatch.setattr(sys, "argv", ["show_regions.py", *map(str, command)])
        show_regions.main()
        return capsys.readouterr().out.splitlines()

    return run


def size_of(path: Path):
    return Image.open(path).size


def test_images_of_the_training_set(row, call, tmp_path):
    config = write(tmp_path, distiller_cfg("GFL", save_teacher(tmp_path, "GFL"), ["LD"]), row)
    printed = call(config, "--images", 2, "--dpi", 50)
    assert printed == [f"{k + 1} of 2: {tmp_path / 'out' / name}" for k, name in enumerate(("0.png", "2.png"))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
    picture = np.asarray(Image.open(tmp_path / "out" / "0.png").convert("RGB"))
    assert picture.std() > 30


def test_a_teacher_of_other_classes(row, call, tmp_path):
    cfg = distiller_cfg("GFL", save_teacher(tmp_path, "GFL"), ["PKD"])
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["DATASETS.CLASSES", "('dog', 'bird', 'fish')"]
    config = write(tmp_path, cfg, row)
    pair = show_regions.Pair(show_regions.load_config(str(config), []))
    assert pair.class_names == ["cat", "dog", "cow", "bird", "fish"]
    printed = call(config, "--images", 1, "--dpi", 50, "--regions", "main", "gibox")
    assert printed[0].startswith("gibox is not shown: ") and "does not know 2 of the student's" in printed[0]


@pytest.mark.parametrize("case, left_out", [("GeneralizedRCNN", 4), ("OpenMMLabFCOS", 2)])
def test_without_a_teacher_and_untrained(row, call, tmp_path, case, left_out):
    printed = call(write(tmp_path, detector_cfg(case), row), "--images", 1, "--regions", *show_regions.SELECTED)
    assert len([line for line in printed if " is not shown: " in line]) == left_out
    assert (tmp_path / "out" / "0.png").exists()


def test_named_images_have_boxes_if_a_data_set_has_them(row, call, tmp_path):
    config = write(tmp_path, detector_cfg("GFL"), row)
    known = show_regions.load_config(str(config), [])
    show_regions.register_datasets(known)
    write_image(tmp_path / "new.png", 60, 40, seed=0)
    files = [f"{row[2]}/1.png", str(tmp_path / "new.png")]
    first, second = show_regions.find_records(known, files, number=9)
    assert len(first["annotations"]) == 1 and "annotations" not in second
    call(config, "--regions", "main", "--dpi", 50, "--input", *files, "SEED", 1)
    with_regions, without = (size_of(tmp_path / "out" / name) for name in ("1.png", "new.png"))
    assert with_regions[1] > 1.5 * without[1]


def test_files_of_the_same_name_have_pictures_of_their_own(row, call, tmp_path):
    config = write(tmp_path, detector_cfg("RetinaNet"), row)
    files = [tmp_path / folder / "new.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        write_image(file, 60, 40, seed=0)
    call(config, "--regions", "main", "--dpi", 50, "MODEL.WEIGHTS", "", "--input", *files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["new.png", "new_2.png"]


def test_mistakes_are_one_sentence(row, call, tmp_path):
    config = write(tmp_path, detector_cfg("GFL"), row)
    with pytest.raises(SystemExit, match="error: --input: there is no file none.png"):
        call(config, "--input", "none.png")
    with pytest.raises(SystemExit, match="error: MODEL.WEIGHTS: there is no file none.pth"):
        call(config, "MODEL.WEIGHTS", "none.pth")
    with pytest.raises(SystemExit, match="error: DATASETS.TRAIN and DATASETS.TEST are empty"):
        call(config, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()")
    assert not (tmp_path / "out").exists()
