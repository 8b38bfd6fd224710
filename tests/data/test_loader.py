"""The training loader: same bits for any number of workers, exact resume, every image once an epoch."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from d2_distill.data.loader import build_train_loader
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from .small_sets import TALL, WIDE, small_cfg, write_coco

SIZES = (WIDE, TALL, WIDE, WIDE, WIDE, TALL, WIDE, WIDE)  # image 4 has no box
AS_DRAWN = {"DATALOADER__ASPECT_RATIO_GROUPING": False, "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False}


def make_cfg(tmp_path, sizes=SIZES, **data):
    row = write_coco(tmp_path, sizes=sizes)
    cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), **data)
    register_datasets(cfg)
    return cfg


def batches(loader, number):
    return list(itertools.islice(loader, number))


def image_ids(loader, number):
    return [[sample["image_id"] for sample in batch] for batch in batches(loader, number)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(itertools.chain(*left), itertools.chain(*right)):
        assert a["image_id"] == b["image_id"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)


class NoisyMapper:
    """Draws from all three generators."""

    def __call__(self, record):
        draws = random.random(), np.random.rand(), torch.rand(()).item()
        return {"image_id": record["image_id"], "draws": draws}


def test_same_bits_for_any_number_of_workers(tmp_path):
    cfg = make_cfg(tmp_path)
    expected = batches(build_train_loader(cfg), 8)
    for num_workers in (1, 2):
        cfg.DATALOADER.NUM_WORKERS = num_workers
        assert_same(batches(build_train_loader(cfg), 8), expected)
    shapes = {tuple(sample["image"].shape) for batch in expected for sample in batch}
    assert len(shapes) > 2  # the augmentation does vary


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_resumed_loader_continues_bit_for_bit(tmp_path, grouping, sampler):
    cfg = make_cfg(tmp_path, DATALOADER__ASPECT_RATIO_GROUPING=grouping, DATALOADER__SAMPLER_TRAIN=sampler,
                   DATALOADER__REPEAT_THRESHOLD=0.9)
    expected = batches(build_train_loader(cfg), 12)
    assert_same(batches(build_train_loader(cfg, start_iter=7), 5), expected[7:])
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_iter = 11
    assert_same(batches(loader, 1), expected[11:])


def test_skipped_batches_are_not_read(tmp_path):
    seen = []

    def mapper(record):
        seen.append(record["image_id"])
        return record

    expected = batches(build_train_loader(make_cfg(tmp_path), start_iter=50, mapper=mapper), 1)
    assert seen == [record["image_id"] for record in expected[0]]


def test_all_generators_are_seeded_by_position_and_left_alone(tmp_path):
    cfg = make_cfg(tmp_path)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    expected = batches(build_train_loader(cfg, mapper=NoisyMapper()), 6)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert batches(build_train_loader(cfg, mapper=NoisyMapper()), 6) == expected
    for column in zip(*(sample["draws"] for batch in expected for sample in batch)):
        assert len(set(column)) == 12


def test_order_is_that_of_detectron2s_sampler(tmp_path):
    cfg = make_cfg(tmp_path, **AS_DRAWN)
    expected = [100 + index for index in itertools.islice(TrainingSampler(len(SIZES), seed=cfg.SEED), 20)]
    assert sum(image_ids(build_train_loader(cfg), 10), []) == expected


@pytest.mark.parametrize("filter_empty, expected", [(True, {0, 1, 2, 3, 5, 6, 7}), (False, set(range(8)))])
def test_images_without_boxes_are_left_out_on_request(tmp_path, filter_empty, expected):
    cfg = make_cfg(tmp_path, DATALOADER__FILTER_EMPTY_ANNOTATIONS=filter_empty)
    assert {id - 100 for batch in image_ids(build_train_loader(cfg), 16) for id in batch} == expected


def test_ranks_share_each_epoch(tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path, **AS_DRAWN, SOLVER__IMS_PER_BATCH=4)
    alone = sum(image_ids(build_train_loader(cfg), 4), [])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    streams, draws = [], []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        streams.append(sum(image_ids(build_train_loader(cfg), 4), []))
        noisy = build_train_loader(cfg, mapper=NoisyMapper())
        draws += [sample["draws"] for batch in batches(noisy, 4) for sample in batch]
    assert [id for pair in zip(*streams) for id in pair] == alone
    assert len(set(alone[:8])) == 8 and not set(streams[0][:4]) & set(streams[1][:4])
    assert len(set(draws)) == 16


def test_batches_are_all_wide_or_all_tall(tmp_path):
    cfg = make_cfg(tmp_path)

    def shapes_in_batches():
        return [{SIZES[id - 100] for id in batch} for batch in image_ids(build_train_loader(cfg), 20)]

    shapes = shapes_in_batches()
    assert all(len(shape) == 1 for shape in shapes) and set.union(*shapes) == {WIDE, TALL}
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert any(len(shape) == 2 for shape in shapes_in_batches())


def test_seed(tmp_path):
    cfg = make_cfg(tmp_path)
    assert image_ids(build_train_loader(cfg, seed=1), 9) == image_ids(build_train_loader(cfg, seed=2), 9)
    cfg.SEED = -1
    first = batches(build_train_loader(cfg, seed=1), 9)
    assert_same(batches(build_train_loader(cfg, seed=1), 9), first)
    assert image_ids(build_train_loader(cfg, seed=2), 9) != image_ids(build_train_loader(cfg, seed=1), 9)
    assert len(batches(build_train_loader(cfg), 2)) == 2


def test_workers_serve_a_second_iterator(tmp_path):
    loader = build_train_loader(make_cfg(tmp_path, DATALOADER__NUM_WORKERS=1))
    assert_same(batches(loader, 3), batches(loader, 3))


def test_unsupported_settings(tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path, DATALOADER__SAMPLER_TRAIN="RandomSubsetTrainingSampler")
    with pytest.raises(UserError, match="DATALOADER.SAMPLER_TRAIN is 'RandomSubsetTrainingSampler'; use"):
        build_train_loader(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH is 3, which 2 processes .*multiple of 2"):
        build_train_loader(cfg)
