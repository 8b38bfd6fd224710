"""Scalars of a training: ``EventStorage`` collects them, writers put them on screen and disk."""

from __future__ import annotations

import datetime
import functools
import json
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fvcore.common.history_buffer import HistoryBuffer

from .file_io import PathManager

_STORAGES: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """The storage of the innermost ``with EventStorage()`` around the call."""
    assert _STORAGES, "No event storage is open: use 'with EventStorage():' around this call."
    return _STORAGES[-1]


class EventStorage:
    """The history of named scalars, with the iteration of each value.

    Attributes:
        iter: current iteration, from 0; the trainer sets it.
    """

    def __init__(self, start_iter: int = 0):
        self.iter = start_iter
        self._histories: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._prefix = ""

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a value.

        Args:
            smoothing_hint: whether the value is noisy, so that writers show a median; the same at every call.
            cur_iter: its iteration, if not the current one.
        """
        name, value = self._prefix + name, float(value)
        iteration = self.iter if cur_iter is None else cur_iter
        hint = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert hint == smoothing_hint, f"{name} was put with smoothing_hint={hint} before."
        self._histories[name].update(value, iteration)
        self._latest[name] = (value, iteration)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float
    ) -> None:
        """Add a value to each of the scalars named by the keywords."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Scalars put inside are called ``<name>/...``; a scope inside replaces it."""
        outer, self._prefix = self._prefix, name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._prefix = outer

    def history(self, name: str) -> HistoryBuffer:
        """KeyError if nothing was put under this name."""
        if name not in self._histories:
            raise KeyError(f"No scalar {name!r} was put so far.")
        return self._histories[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._histories

    def latest(self) -> dict[str, tuple[float, int]]:
        """Name -> last value and its iteration."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As `latest`, with the median over the window in place of values whose hint asks for it."""
        return {
            name: (self._histories[name].median(self.count_samples(name, window_size))
                   if self._smoothing_hints[name] else value, iteration)
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many values of the scalar belong to the ``window_size`` iterations up to its last one."""
        iterations = [iteration for _, iteration in self._histories[name].values()]
        return sum(iteration > iterations[-1] - window_size for iteration in iterations)

    def __enter__(self) -> "EventStorage":
        _STORAGES.append(self)
        return self

    def __exit__(self, exc_type, exc_val, exc_tb) -> None:
        _STORAGES.pop()


class EventWriter(ABC):
    """Takes events out of the current storage when ``write`` is called."""

    @abstractmethod
    def write(self) -> None:
        ...

    def close(self) -> None:
        pass


class _NewScalars:
    """The scalars that were updated since they were last asked for."""

    def __init__(self, window_size: int):
        self._window_size = window_size
        self._last_iteration = -1

    def take(self, storage: EventStorage) -> dict[str, tuple[float, int]]:
        scalars = {
            name: (value, iteration)
            for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items()
            if iteration > self._last_iteration
        }
        self._last_iteration = max([self._last_iteration, *(iteration for _, iteration in scalars.values())])
        return scalars


class JSONWriter(EventWriter):
    """Appends scalars to a file, one JSON object with key ``iteration`` a line."""

    def __init__(self, json_file: str, window_size: int = 20):
        self._file = PathManager.open(json_file, "a")
        self._scalars = _NewScalars(window_size)

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in self._scalars.take(get_event_storage()).items():
            lines[iteration][name] = value
        for iteration, scalars in lines.items():
            self._file.write(json.dumps({**scalars, "iteration": iteration}, sort_keys=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Writes scalars for TensorBoard, into files made at the first write."""

    def __init__(self, log_dir: str, window_size: int = 20):
        self._log_dir = log_dir
        self._scalars = _NewScalars(window_size)

    @functools.cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._log_dir)

    def write(self) -> None:
        for name, (value, iteration) in self._scalars.take(get_event_storage()).items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the remaining time, losses, times, learning rate and GPU memory."""

    def __init__(self, max_iter: int, window_size: int = 20):
        """``max_iter`` is the last iteration + 1."""
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration == self._max_iter:  # after training; nothing new happened
            return
        eta = self._eta(storage)
        losses, metrics = self._medians(storage, "loss"), self._medians(storage, "[metric]")
        times = self._time(storage, "time", whole_history=True) + self._time(storage, "data_time")
        lr = f"{storage.history('lr').latest():.5g}" if "lr" in storage.histories() else "N/A"
        memory = ""
        if torch.cuda.is_available():
            memory = f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        self.logger.info(f" {eta}iter: {iteration}  {losses}  {metrics}  {times} lr: {lr}  {memory}")

    def _eta(self, storage: EventStorage) -> str:
        if "time" not in storage.histories():
            return ""
        seconds = storage.history("time").median(1000) * (self._max_iter - storage.iter - 1)
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return f"eta: {datetime.timedelta(seconds=int(seconds))}  "

    def _medians(self, storage: EventStorage, part_of_name: str) -> str:
        return "  ".join(
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items() if part_of_name in name)

    def _time(self, storage: EventStorage, name: str, whole_history: bool = False) -> str:
        if name not in storage.histories():
            return ""
        history = storage.history(name)
        window = storage.count_samples(name, self._window_size)
        mean = history.global_avg() if whole_history else history.avg(window)
        return f"{name}: {mean:.4f}  last_{name}: {history.latest():.4f}  "
