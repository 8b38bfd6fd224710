"""Samplers that split the indices of a data set over the processes, endlessly or once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.utils import comm
from torch.utils.data.sampler import Sampler


class _InfiniteSampler(Sampler):
    """Epoch after epoch without end; process r of w takes every w-th index, from the r-th on.

    All processes must agree on the seed.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._indices(), self._rank, None, self._world_size)

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from self._epoch(generator).tolist()

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        raise NotImplementedError


class TrainingSampler(_InfiniteSampler):
    """All indices below ``size`` in each epoch, newly shuffled."""

    def __init__(self, size: int, *, seed: int):
        if size <= 0:
            raise ValueError(f"TrainingSampler needs a positive size, not {size}.")
        self._size = size
        super().__init__(seed)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self._size, generator=generator)


class RepeatFactorTrainingSampler(_InfiniteSampler):
    """Each index i ``repeat_factors[i]`` times in an epoch, on average: fractions are rounded at random.

    Source: repeat factor sampling of the LVIS paper (Gupta et al. 2019, appendix B.2).
    """

    def __init__(self, repeat_factors: torch.Tensor, *, seed: int):
        self._whole = torch.trunc(repeat_factors)
        self._fraction = repeat_factors - self._whole
        super().__init__(seed)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        round_up = torch.rand(len(self._fraction), generator=generator) < self._fraction
        counts = (self._whole + round_up).long()
        indices = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return indices[torch.randperm(len(indices), generator=generator)]

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """One factor an image: that of its rarest category, max(1, thresh / f), or the root of the quotient.

        f is the fraction of images that contain the category. Images without annotation get 1.
        """
        categories = [{a["category_id"] for a in record["annotations"]} for record in dataset_dicts]
        images_with = Counter(itertools.chain.from_iterable(categories))
        factor = {}
        for category, count in images_with.items():
            quotient = repeat_thresh / (count / len(dataset_dicts))
            factor[category] = max(1.0, math.sqrt(quotient) if sqrt else quotient)
        per_image = [max((factor[c] for c in present), default=1.0) for present in categories]
        return torch.tensor(per_image, dtype=torch.float32)


class InferenceSampler(Sampler):
    """Every index once: a contiguous shard for each process, the first ones larger by one if need be."""

    def __init__(self, size: int):
        rank, world_size = comm.get_rank(), comm.get_world_size()
        share, larger = divmod(size, world_size)
        begin = rank * share + min(rank, larger)
        self._local_indices = range(begin, begin + share + (rank < larger))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)
