"""Packed records are copies of what was packed, and their index tells what the loader asks for."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from detectron2.structures import BoxMode

from d2_distill.data.packed import PackedRecords

BOX = {"bbox": [1, 2, 3.5, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
RECORDS = [
    {"file_name": "a.png", "width": 30, "height": 20, "annotations": [{**BOX, "iscrowd": 1}, BOX]},
    {"file_name": "b.png", "width": 20, "height": 30, "annotations": [{**BOX, "iscrowd": 1}]},
    {"file_name": "c.png", "mine": np.arange(3).tolist()},
]


def test_each_access_is_a_copy():
    expected = copy.deepcopy(RECORDS)
    packed = PackedRecords.of(RECORDS)
    RECORDS[0]["annotations"][0]["bbox"][0] = packed[0]["annotations"][0]["bbox"][0] = 9
    assert len(packed) == 3 and packed.unpacked() == expected
    RECORDS[0] = expected[0]
    assert pickle.loads(pickle.dumps(packed)).unpacked() == expected
    with pytest.raises(IndexError):
        packed[3]


def test_index():
    index = PackedRecords.of(RECORDS).index
    assert index.sizes.tolist() == [[30, 20], [20, 30], [0, 0]]
    assert index.has_objects.tolist() == [True, False, False]


def test_nothing():
    packed = PackedRecords.of([])
    assert len(packed) == 0 and packed.unpacked() == [] and packed.index.sizes.shape == (0, 2)
