"""Boxes on images: where lines lie, what is enlarged, and labels that stay inside."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import BoxMode

from d2_distill.apps.pictures import class_color, draw_boxes, ground_truth, name_of
from d2_distill.apps.pictures.boxes import READABLE

LIME = np.array((0, 255, 0))


def test_lines_lie_on_the_sides_of_the_box_and_the_input_is_kept():
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    picture = draw_boxes(image, torch.tensor([[50.0, 60, 150, 200]]), [""], ["lime"])
    assert picture.shape == image.shape and not image.any()
    rows, columns = np.nonzero((picture == LIME).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 200, 50, 150)
    assert not picture[70:190, 60:140].any()


def test_small_images_are_enlarged_with_their_boxes():
    picture = draw_boxes(np.zeros((40, 48, 3), dtype=np.uint8), torch.tensor([[10.0, 10, 20, 20]]), [""], ["lime"])
    scale = READABLE // 48
    assert picture.shape == (40 * scale, 48 * scale, 3)
    rows, columns = np.nonzero((picture == LIME).all(axis=2))
    assert (rows.min(), columns.max()) == (10 * scale, 20 * scale)


def test_labels_stay_inside_the_image():
    image = np.zeros((300, 300, 3), dtype=np.uint8)
    corner = draw_boxes(image, torch.tensor([[295.0, 0, 300, 300]]), ["a long label"], ["lime"])
    filled = (corner == LIME).all(axis=2)
    assert filled[:20, 200:290].sum() > 200  # the label, moved to the left
    plain = draw_boxes(image, torch.tensor([[295.0, 0, 300, 300]]), [""], ["lime"])
    assert (plain == LIME).all(axis=2).sum() < filled.sum()


def test_no_boxes_give_the_image_itself():
    image = np.full((300, 300, 3), 7, dtype=np.uint8)
    assert (draw_boxes(image, torch.zeros(0, 4), [], []) == image).all()


def test_colors_and_names_of_classes():
    assert len({class_color(index) for index in range(80)}) == 80
    assert name_of(1, ["cat", "dog"]) == "dog"
    assert name_of(2, ["cat", "dog"]) == "2"


def test_ground_truth_leaves_crowds_out():
    box = {"bbox": [1.0, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    found = ground_truth({"height": 20, "width": 20, "annotations": [box, {**box, "iscrowd": 1}]})
    assert found.gt_boxes.tensor.tolist() == [[1, 2, 4, 6]] and found.gt_classes.tolist() == [1]
