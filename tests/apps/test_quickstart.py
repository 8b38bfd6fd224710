"""The quick-start data: same bytes again, honest boxes, disjoint splits, never half a folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from d2_distill.apps import quickstart
from d2_distill.errors import UserError

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_quickstart.py"
SMALL = {"train_images": 12, "val_images": 5}


def _digests(folder: Path):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_arguments_give_the_same_bytes(tmp_path):
    first, second = (_digests(quickstart.prepare(tmp_path / name, **SMALL)) for name in "ab")
    other_seed = _digests(quickstart.prepare(tmp_path / "c", seed=1, **SMALL))
    assert len(first) == 12 + 5 + 2
    assert first == second
    assert not set(first.values()) & set(other_seed.values())


def test_files_are_coco_and_match_the_images(tmp_path):
    folder = quickstart.prepare(tmp_path, **SMALL)
    for split, count in (("train", 12), ("val", 5)):
        coco = COCO(str(folder / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count == len(list((folder / split).iterdir()))
        assert [category["name"] for category in coco.cats.values()] == list("0123456789")
        for image_id, image in coco.imgs.items():
            pixels = np.asarray(Image.open(folder / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)
            annotations = coco.imgToAnns[image_id]
            assert 1 <= len(annotations) <= 5
            for annotation in annotations:
                x, y, width, height = annotation["bbox"]
                assert 0 <= x < x + width <= 96 and 0 <= y < y + height <= 96
                assert 10 <= height <= 48 and width >= 2 and annotation["area"] == width * height


def test_boxes_are_tight(tmp_path):
    rng = np.random.default_rng(0)
    digits, photographs = quickstart._sources()
    scenes = quickstart._Scenes(digits, [np.zeros_like(photographs[0])], 96, rng)
    for _ in range(20):
        opacity, _ = scenes._digit()
        edges = (opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1])
        assert all(edge.max() >= quickstart.INK for edge in edges)


def test_splits_share_no_digit_and_no_piece_of_a_photograph():
    digits, photographs = quickstart._sources()
    train, val = (quickstart._digits_of(digits, split) for split in ("train", "val"))
    assert len(train) + len(val) == len(digits)
    assert not {id(image) for image, _ in train} & {id(image) for image, _ in val}
    assert {label for _, label in val} == set(range(10))
    regions = zip(*(quickstart._regions_of(photographs, split) for split in ("train", "val")))
    assert not any(np.shares_memory(a, b) for a, b in regions)


def test_existing_folder_is_kept_and_never_overwritten(tmp_path):
    folder = quickstart.prepare(tmp_path, **SMALL)
    before = _digests(folder)
    assert quickstart.prepare(tmp_path, **SMALL) == folder
    with pytest.raises(UserError, match="holds data made with.*'seed': 0"):
        quickstart.prepare(tmp_path, seed=1, **SMALL)
    (folder / "annotations" / "instances_val.json").write_text("[]")
    with pytest.raises(UserError, match="holds other data"):
        quickstart.prepare(tmp_path, **SMALL)
    assert before.keys() == _digests(folder).keys()


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    compose = quickstart._Scenes.compose

    def interrupted(self):
        if self.rng.random() < 0.2:
            raise KeyboardInterrupt
        return compose(self)

    monkeypatch.setattr(quickstart._Scenes, "compose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.prepare(tmp_path, train_images=200)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"train_images": 0}, {"size": 40}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(UserError, match="needs at least one image a split"):
        quickstart.prepare(tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
        )

    assert "Example: python datasets/prepare_quickstart.py" in run("--help").stdout
    made = run("--train-images", "2", "--val-images", "1")
    assert made.returncode == 0 and f"Quick-start data: {tmp_path / 'quickstart'}" in made.stdout
    refused = run("--train-images", "3")
    assert refused.returncode == 1 and "remove it" in refused.stderr and "Traceback" not in refused.stderr
