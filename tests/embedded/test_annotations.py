"""Masks, polygons and keypoints follow the image; what a mapper leaves out is replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.common import MapDataset
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as masks_of_coco
from torch.utils.data import IterableDataset

HEIGHT, WIDTH = 20, 30
POLYGON = [2.0, 3.0, 10.0, 3.0, 10.0, 9.0]


def annotation(**fields):
    return {"bbox": [2, 3, 8, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0, **fields}


def flip():
    return T.TransformList([T.HFlipTransform(WIDTH)])


def test_polygons_are_flipped_and_resized():
    row = utils.transform_instance_annotations(annotation(segmentation=[POLYGON]), flip(), (HEIGHT, WIDTH))
    assert row["segmentation"][0].tolist() == [28, 3, 20, 3, 20, 9] and row["bbox"].tolist() == [20, 3, 28, 9]
    resize = T.TransformList([T.ResizeTransform(HEIGHT, WIDTH, 40, 90)])
    row = utils.transform_instance_annotations(annotation(segmentation=[POLYGON]), resize, (40, 90))
    assert row["segmentation"][0].tolist() == [6, 6, 30, 6, 30, 18]


def test_run_lengths_become_a_flipped_mask():
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[3:9, 2:10] = 1
    runs = masks_of_coco.encode(np.asfortranarray(mask))
    row = utils.transform_instance_annotations(annotation(segmentation=runs), flip(), (HEIGHT, WIDTH))
    assert (row["segmentation"] == mask[:, ::-1]).all()
    with pytest.raises(ValueError):
        utils.transform_instance_annotations(annotation(segmentation=5), flip(), (HEIGHT, WIDTH))


def test_keypoints_change_sides_with_the_image():
    # left eye, right eye, nose that is not labelled, and one that leaves the image
    points = [4, 5, 2, 8, 5, 1, 6, 6, 0, 40, 5, 2]
    indices = [1, 0, 2, 3]
    row = utils.transform_instance_annotations(
        annotation(keypoints=points), flip(), (HEIGHT, WIDTH), keypoint_hflip_indices=indices
    )
    assert np.asarray(row["keypoints"]).tolist() == [[22, 5, 1], [26, 5, 2], [0, 0, 0], [0, 0, 0]]
    twice = T.TransformList([T.HFlipTransform(WIDTH)] * 2)
    row = utils.transform_instance_annotations(annotation(keypoints=points), twice, (HEIGHT, WIDTH))
    assert np.asarray(row["keypoints"])[:2].tolist() == [[4, 5, 2], [8, 5, 1]]
    for wrong in ([1, 0], None):
        with pytest.raises((ValueError, AssertionError)):
            utils.transform_instance_annotations(
                annotation(keypoints=points), flip(), (HEIGHT, WIDTH), keypoint_hflip_indices=wrong
            )


def test_flip_indices_of_keypoints():
    metadata = MetadataCatalog.get("keypoints_of_test")
    metadata.set(keypoint_names=["nose", "left", "right"], keypoint_flip_map=[("left", "right")])
    try:
        assert list(utils.create_keypoint_hflip_indices(("keypoints_of_test",))) == [0, 2, 1]
    finally:
        MetadataCatalog.remove("keypoints_of_test")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_resized_masks_have_no_new_classes(dtype):
    classes = np.zeros((8, 8), dtype=dtype)
    classes[:, 3:] = 7
    resize = T.ResizeTransform(8, 8, 12, 20)
    resized = resize.apply_segmentation(classes) if dtype != np.int64 else resize.apply_segmentation(classes.astype(np.float64))
    assert resized.shape == (12, 20) and set(np.unique(resized)) == {0, 7}


def test_images_of_other_types_are_resized():
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    resized = T.ResizeTransform(8, 8, 8, 16).apply_image(ramp[:, :, None])
    assert resized.shape == (8, 16, 1) and resized.dtype == np.float32
    assert resized[0, 2:4, 0].tolist() == pytest.approx([0.75, 1.25])


def test_all_of_an_input_is_transformed():
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    classes = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    classes[:, :10] = 3
    given = T.AugInput(image, boxes=np.array([[2.0, 3, 10, 9]]), sem_seg=classes)
    done = given.apply_augmentations([T.HFlipTransform(WIDTH), T.ResizeShortestEdge((40,), 100, "choice")])
    assert len(done.transforms) == 2 and given.image.shape == (40, 60, 3) and given.boxes.tolist() == [[40, 6, 56, 18]]
    assert (given.sem_seg[:, 40:] == 3).all() and (given.sem_seg[:, :40] == 0).all()


def test_mapper_reads_classes_of_pixels_and_leaves_masks(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :, 0] + 4).save(tmp_path / "classes.png")
    record = {
        "file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "classes.png"), "image_id": 1,
        "height": HEIGHT, "width": WIDTH, "annotations": [annotation(segmentation=[POLYGON], keypoints=[4, 5, 2])],
    }
    mapper = DatasetMapper(is_train=True, augmentations=[T.RandomFlip(prob=1.0)], image_format="BGR")
    sample = mapper(record)
    assert sample["sem_seg"].shape == (HEIGHT, WIDTH) and sample["sem_seg"].dtype == torch.int64
    assert (sample["sem_seg"] == 4).all() and set(sample["instances"].get_fields()) == {"gt_boxes", "gt_classes"}


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(6))


def odd(number):
    return number if number % 2 else None


def test_what_a_mapper_leaves_out_is_replaced():
    mapped = MapDataset(list(range(6)), odd)
    for _ in range(3):
        values = [mapped[index] for index in range(6)]
        assert set(values) <= {1, 3, 5} and values[1::2] == [1, 3, 5]
    assert list(MapDataset(Numbers(), odd)) == [1, 3, 5]
    with pytest.raises(ValueError):
        MapDataset([1, 2], lambda number: None)[0]
