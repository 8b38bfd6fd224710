"""Fields of annotation files and pictures that are not what they have to be: training and check_data refuse alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from PIL import Image

from d2_distill.config.keys import get_distill_cfg
from d2_distill.data.mapper import CheckedDatasetMapper
from d2_distill.data.pictures import read_image

from ..data.small_sets import WIDE, coco_content, write_coco
from ..small_detectors import detector_cfg
from .command_line import call

SIZES = (WIDE,) * 4
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    row = write_coco(folder / "data", sizes=SIZES)
    cfg = detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=2)
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN = (row,), (row[0],)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR = 0, 1, 1, "output"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (32,), 64
    (folder / "run.yaml").write_text(cfg.dump())
    return folder


def _set(section: str, field: str, value, entry: int = 0):
    def edit(content):
        content[section][entry][field] = value

    return edit


def _drop(section: str, field: str | None = None):
    def edit(content):
        del (content[section][0] if field else content)[field or section]

    return edit


def _replace(section: str, value):
    def edit(content):
        content[section] = value

    return edit


def _all_boxes(box):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = box

    return edit


# What is wrong -> change of the file, and what the message names.
FAULTS = {
    **{f"iscrowd {value!r}": (_set("annotations", "iscrowd", value), "iscrowd") for value in (None, "0", "1", 2, -1, [], NAN)},
    **{
        f"bbox {value!r}": (_set("annotations", "bbox", value), "bbox")
        for value in (None, "1,2,3,4", [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [[1, 2, 3, 4]], [1, 2, None, 4], {})
    },
    **{f"bbox {value!r}": (_set("annotations", "bbox", value), "box") for value in ([NAN, 2, 3, 4], [1, 2, INFINITE, 4])},
    **{f"category_id {value!r}": (_set("annotations", "category_id", value), "category_id") for value in (None, 10.0, "10", True, [])},
    **{f"image_id {value!r}": (_set("annotations", "image_id", value), "image_id") for value in (None, 100.5, [], {})},
    **{f"annotation id {value!r}": (_set("annotations", "id", value), "id") for value in (None, 1.5, [])},
    "ids twice": (_set("annotations", "id", 2), "id 2"),
    "unknown image": (_set("annotations", "image_id", 999), "999"),
    "unknown category": (_set("annotations", "category_id", 999), "999"),
    **{f"width {value!r}": (_set("images", "width", value), "width") for value in (None, "30", 0, -3, 30.5, NAN, True)},
    **{f"file_name {value!r}": (_set("images", "file_name", value), "file_name") for value in (None, "", 5, [])},
    **{f"image id {value!r}": (_set("images", "id", value), "id") for value in (None, 1.5, [])},
    **{f"category id {value!r}": (_set("categories", "id", value), "id") for value in (None, 1.5, "10")},
    **{f"category name {value!r}": (_set("categories", "name", value), "name") for value in (None, "", 5)},
    **{f"no {section}": (_drop(section), section) for section in ("images", "annotations", "categories")},
    **{f"{section} {value!r}": (_replace(section, value), section) for section in ("images", "annotations", "categories")
       for value in (None, {}, "x", [None], [5])},
    **{f"annotation without {field}": (_drop("annotations", field), field) for field in ("bbox", "category_id", "image_id")},
    **{f"image without {field}": (_drop("images", field), field) for field in ("file_name", "width", "height", "id")},
    "segmentation": (_set("annotations", "segmentation", 5), "segmentation"),
    "a folder as image": (_set("images", "file_name", "."), "folder"),
    "a missing image": (_set("images", "file_name", "none.png"), "missing"),
    "backslashes": (_set("images", "file_name", "sub\\\\0.png"), "backslashes"),
    "corners": (_all_boxes([20, 12, 29, 19]), "corners"),
    "relative": (_all_boxes([0.1, 0.2, 0.3, 0.4]), "first pixel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fields(place, name):
    edit, named = FAULTS[name]
    content = coco_content(SIZES)
    edit(content)
    path = place / "data" / "set.json"
    before = path.read_text()
    path.write_text(json.dumps(content))
    try:
        files = sorted(place.rglob("*"))
        trained = call("train_net.py", "--config-file", "run.yaml", folder=place)
        checked = call("tools/check_data.py", "--config-file", "run.yaml", folder=place)
        assert sorted(place.rglob("*")) == files
    finally:
        path.write_text(before)
    for ended in (trained, checked):
        assert ended.status == 1 and not ended.has_traceback and named in ended.output, ended.output
    assert len(trained.errors) == 1


def test_the_unchanged_file_is_accepted(place):
    """With what other tools leave in files, too."""
    content = coco_content(SIZES)
    content["annotations"][0].update(iscrowd=0.0, ignore=False, segmentation=[], attributes={"x": 1})
    content["images"][0].update(license=None, width=30.0)
    del content["annotations"][1]["iscrowd"]
    path = place / "data" / "set.json"
    before = path.read_text()
    path.write_text(json.dumps(content))
    try:
        ended = call("tools/check_data.py", "--config-file", "run.yaml", folder=place)
    finally:
        path.write_text(before)
    assert ended.status == 0, ended.output


GRADIENT = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)
EIGHT = (GRADIENT.astype(np.int64) * 255 + 32767) // 65535


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_of_16_bits(tmp_path, suffix):
    """Scaled by their range, wherever Detectron2's function or the mapper reads them."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRADIENT).save(path)
    for read in (read_image, detection_utils.read_image):
        found = read(str(path), "BGR")
        assert found.dtype == np.uint8 and found.shape == (20, 30, 3)
        assert (found == EIGHT[:, :, None]).all()
    record = {"file_name": str(path), "width": 30, "height": 20, "image_id": 1}
    cfg = get_distill_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 20, 30
    image = CheckedDatasetMapper(cfg, is_train=False)(record)["image"]
    assert torch.equal(image, torch.from_numpy(EIGHT).to(torch.uint8).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_of_pictures(tmp_path, mode):
    """What a viewer shows as a gray ramp is read as one."""
    picture = Image.fromarray(EIGHT.astype(np.uint8)).convert("RGB")
    if mode in ("HSV", "LAB", "YCbCr"):
        suffix = {"YCbCr": "jpg"}.get(mode, "tif")
        if mode != "YCbCr":
            pytest.skip("Pillow converts it, but viewers differ")
    else:
        suffix = "tif" if mode == "CMYK" else "png"
    picture.convert(mode).save(tmp_path / f"a.{suffix}")
    found = read_image(str(tmp_path / f"a.{suffix}"), "RGB")
    assert found.shape == (20, 30, 3) and found.dtype == np.uint8
    if mode != "1":
        assert np.abs(found.astype(int) - EIGHT[:, :, None]).max() <= (51 if mode == "P" else 8)  # a palette of few grays
    assert found[0].mean() < 64 < 192 < found[-1].mean()


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_thin_pictures(place, tmp_path, size):
    """They train and are looked at; check_data mentions them."""
    row = write_coco(tmp_path / f"thin{size[0]}", sizes=(size, size), edit=lambda content: content.update(
        annotations=[{**content["annotations"][0], "bbox": [0, 0, *size], "area": 5000}]
    ))
    data = ("DATASETS.COCO", repr((row,)), "DATASETS.TRAIN", repr((row[0],)), "OUTPUT_DIR", str(tmp_path / "out"))
    trained = call("train_net.py", "--config-file", "run.yaml", *data, folder=place)
    assert trained.status == 0, trained.output
    seen = call(
        "tools/predict.py", "--config-file", "run.yaml", "--input", row[2], "--output", tmp_path / "seen", *data,
        "MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", folder=place,
    )
    assert seen.status == 0 and len(list((tmp_path / "seen").iterdir())) == 2, seen.output
    checked = call("tools/check_data.py", "--config-file", "run.yaml", *data, folder=place)
    assert not checked.has_traceback and "thin" in checked.output


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "text", "cut", "half"])
def test_files_that_are_no_pictures(place, tmp_path, content):
    path = place / "data" / "images" / "0.png"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2] if content is None else content)
    try:
        for program in ("train_net.py", "tools/check_data.py"):
            ended = call(program, "--config-file", "run.yaml", "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", tmp_path, folder=place)
            assert ended.status == 1 and not ended.has_traceback and "0.png" in ended.output, ended.output
    finally:
        path.write_bytes(before)

