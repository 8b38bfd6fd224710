"""An image that cannot be used is named, also when a worker process finds it."""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data import transforms as T
from PIL import Image

from d2_distill.data.loader import build_train_loader, seeded_rng
from d2_distill.data.mapper import CheckedDatasetMapper, ImageFileError
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from .small_sets import small_cfg, write_coco, write_image


def record(path, width=30, height=20):
    box = {"bbox": [2.0, 3.0, 8.0, 6.0], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    return {"file_name": str(path), "width": width, "height": height, "image_id": 1, "annotations": [box]}


def test_good_image_is_mapped_as_by_detectron2(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    samples = []
    for mapper in (DatasetMapper, CheckedDatasetMapper):
        with seeded_rng(0, 0):
            samples.append(mapper(small_cfg(), is_train=True)(record(tmp_path / "a.png")))
    assert torch.equal(samples[0]["image"], samples[1]["image"])
    assert torch.equal(samples[0]["instances"].gt_boxes.tensor, samples[1]["instances"].gt_boxes.tensor)


def test_integer_boxes_are_not_truncated(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    resize = T.ResizeShortestEdge((33,), 50, "choice")
    mapper = CheckedDatasetMapper(is_train=True, augmentations=[resize], image_format="BGR")
    integers = record(tmp_path / "a.png")
    integers["annotations"][0]["bbox"] = [2, 3, 8, 6]
    expected = torch.tensor([[2 * 50 / 30, 4.95, 10 * 50 / 30, 14.85]])
    for sample in (mapper(integers), mapper(record(tmp_path / "a.png"))):
        assert torch.allclose(sample["instances"].gt_boxes.tensor, expected)
    assert integers["annotations"][0]["bbox"] == [2, 3, 8, 6]


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "text":
        path.write_text("no image")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "broken":
        content = bytearray(path.read_bytes())
        content[33:60] = b"x" * 27  # the header of the pixel data
        path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("how", ["missing", "text", "empty", "truncated"])
def test_unreadable_image(tmp_path, suffix, how):
    path = tmp_path / f"a.{suffix}"
    write_image(path, 30, 20, seed=0)
    spoil(path, how)
    with pytest.raises(UserError, match=f"The image {path} cannot be read .*; restore it or") as caught:
        CheckedDatasetMapper(small_cfg(), is_train=True)(record(path))
    assert "\n" not in str(caught.value)


def test_broken_png(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    spoil(tmp_path / "a.png", "broken")
    with pytest.raises(ImageFileError, match="a.png cannot be read"):
        CheckedDatasetMapper(small_cfg(), is_train=True)(record(tmp_path / "a.png"))


def test_size_mismatch(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    with pytest.raises(ImageFileError, match="a.png has 30 x 20 pixels, .* says 20 x 30; correct"):
        CheckedDatasetMapper(small_cfg(), is_train=True)(record(tmp_path / "a.png", width=20, height=30))


def test_grey_and_transparent_images_are_fine(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (30, 20)).save(tmp_path / "a.png")
        sample = CheckedDatasetMapper(small_cfg(), is_train=True)(record(tmp_path / "a.png"))
        assert sample["image"].shape[0] == 3


def test_other_errors_stay_what_they_are(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    broken = record(tmp_path / "a.png")
    del broken["annotations"][0]["bbox_mode"]
    with pytest.raises(KeyError, match="bbox_mode"):
        CheckedDatasetMapper(small_cfg(), is_train=True)(broken)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_sentence_from_a_worker_of_either_loader(tmp_path, num_workers):
    row = write_coco(tmp_path)
    cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), DATALOADER__NUM_WORKERS=num_workers)
    register_datasets(cfg)
    spoil(tmp_path / "images" / "0.png", "truncated")
    test_mapper = CheckedDatasetMapper(cfg, is_train=False)
    for loader in (build_train_loader(cfg), build_detection_test_loader(cfg, row[0], mapper=test_mapper)):
        with pytest.raises(UserError) as caught:
            for _, _ in zip(range(4), loader):
                pass
        assert str(caught.value).startswith(f"The image {row[2]}/0.png cannot be read (")
        assert str(caught.value).endswith("restore it or remove it from the data set.")
