"""A training loader that can be resumed exactly and does not depend on the number of workers."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, MapDataset
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from ..errors import UserError
from .loaded import load_once
from .mapper import CheckedDatasetMapper, SampleError


def build_train_loader(
    cfg, *, start_iter: int = 0, mapper: Callable[[dict], dict] | None = None, seed: int | None = None
) -> DataLoader:
    """Build the training loader, an infinite iterable of lists of mapped samples.

    Batch ``k`` of a rank depends on the seed, ``k``, the rank and the world size alone: a loader built with
    ``start_iter=k`` continues exactly where an uninterrupted one would be, without reading what was skipped,
    and any ``DATALOADER.NUM_WORKERS`` gives the same bits. Detectron2's samplers order the images.

    Args:
        start_iter: number of batches to skip; ``loader.batch_sampler.start_iter`` can be set until the first
            ``iter(loader)``.
        mapper: maps a record to a sample; the default is :class:`.mapper.CheckedDatasetMapper`.
        seed: used where ``SEED`` is negative; None draws one that all ranks share.

    Raises:
        UserError: the batch cannot be split over the ranks, or the sampler is not supported.
    """
    world_size, total_batch_size = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if total_batch_size <= 0 or total_batch_size % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {total_batch_size}, which {world_size} processes cannot share equally; "
            f"make it a multiple of {world_size}."
        )
    if cfg.SEED >= 0:
        seed = cfg.SEED
    elif seed is None:
        seed = comm.shared_random_seed()
    records, sizes = _training_records(cfg)
    mapper = mapper or CheckedDatasetMapper(cfg, is_train=True)
    num_workers = cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        SeededMapDataset(records, mapper, seed=seed),
        batch_sampler=ResumableBatchSampler(
            _build_sampler(cfg, records, seed),
            batch_size=total_batch_size // world_size,
            sizes=sizes if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
            start_iter=start_iter,
        ),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_init_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),  # else torch draws from the caller's generator
    )


def build_test_loader(cfg, name: str, mapper: Callable[[dict], dict]) -> DataLoader:
    """Build a loader of a registered data set's images, one a batch; each process gets its share of them.

    Args:
        mapper: maps a record to a sample.
    """
    records = load_once(name).records()
    return DataLoader(
        MapDataset(records, mapper),
        sampler=InferenceSampler(len(records)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )


def check_batch(cfg) -> None:
    """
    Raises:
        UserError: a batch has more images than there are to train on.
    """
    batch, images = cfg.SOLVER.IMS_PER_BATCH, len(_training_records(cfg)[0])
    if batch > images:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, but DATASETS.TRAIN has {images} images to train on; lower it to {images} or less."
        )


def _training_records(cfg) -> tuple[Dataset, np.ndarray]:
    """Return the records of ``DATASETS.TRAIN`` to train on, and their (N, 2) widths and heights."""
    parts = [load_once(name).records() for name in cfg.DATASETS.TRAIN]
    records, sizes = ConcatDataset(parts), np.concatenate([part.index.sizes for part in parts])
    if not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return records, sizes
    chosen = np.flatnonzero(np.concatenate([part.index.has_objects for part in parts]))
    return Subset(records, chosen), sizes[chosen]


class ResumableBatchSampler(Sampler):
    """Batches of ``(index, position)``: an index into the data set and its place in the stream of all ranks.

    Args:
        sampler: infinite stream of this rank's indices, every ``world_size``-th of the stream of all ranks.
        batch_size: of this rank.
        sizes: (N, 2), width and height per index, to put only wide or only tall images into a batch; None: as drawn.
        start_iter: number of batches that are left out.
    """

    def __init__(
        self, sampler, *, batch_size: int, sizes: np.ndarray | None = None, start_iter: int = 0
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.sizes = sizes
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start_iter, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        keys = zip(self.sampler, itertools.count(comm.get_rank(), comm.get_world_size()))
        if self.sizes is None:
            while True:
                yield list(itertools.islice(keys, self.batch_size))
        records = (
            {"width": self.sizes[index][0], "height": self.sizes[index][1], "key": (index, position)}
            for index, position in keys
        )
        for batch in AspectRatioGroupedDataset(records, self.batch_size):
            yield [record["key"] for record in batch]


class SeededMapDataset(Dataset):
    """``mapper(records[index])`` for a key ``(index, position)``, which also seeds its random numbers.

    As in Detectron2 another record takes the place of one of which the mapper makes None.
    """

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict], *, seed: int):
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, position = key
        sample = self._mapped(index, position)
        return self._another(index, position) if sample is None else sample

    def _mapped(self, index: int, position: int) -> dict | None:
        with seeded_rng(self.seed, position):
            return self.mapper(self.records[index])

    def _another(self, index: int, position: int) -> dict:
        """The sample of a random other record: one that depends on the key alone, so that runs resume exactly."""
        order = np.random.default_rng((self.seed, position)).permutation(len(self))
        for other in order[order != index].tolist():
            sample = self._mapped(other, position)
            if sample is not None:
                return sample
        raise SampleError("The mapper returns None for every image of DATASETS.TRAIN; let it return a sample of some.")


@contextlib.contextmanager
def seeded_rng(seed: int, position: int) -> Iterator[None]:
    """Seed random, numpy and torch's CPU generator from ``(seed, position)``; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence((seed, position)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would seed the GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _build_sampler(cfg, records: Dataset, seed: int):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            [records[index] for index in range(len(records))], cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(repeat_factors, seed=seed)
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; use 'TrainingSampler' or 'RepeatFactorTrainingSampler'."
    )


def _init_worker(worker_id: int) -> None:
    # Ctrl-C goes to the terminal's whole process group, but the training process finishes its step with its workers.
    os.setpgid(0, 0)
    # The workers are the parallelism already; OpenCV's own threads on top oversubscribe the cores.
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
