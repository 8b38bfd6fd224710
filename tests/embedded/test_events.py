from __future__ import annotations

import json

import pytest
import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)


def test_storages_nest():
    with EventStorage(3) as outer:
        with EventStorage() as inner:
            assert get_event_storage() is inner
        assert get_event_storage() is outer and outer.iter == 3
    with pytest.raises(AssertionError):
        get_event_storage()


def test_scalars():
    storage = EventStorage()
    storage.put_scalars(a=1, b=torch.tensor(2.0))
    storage.put_scalar("a", 5.0, cur_iter=7)
    assert storage.latest() == {"a": (5.0, 7), "b": (2.0, 0)}
    assert storage.count_samples("a", 7) == 1 and storage.count_samples("a", 8) == 2
    assert storage.latest_with_smoothing_hint(8)["a"] == (3.0, 7)
    assert storage.history("a").latest() == 5.0
    with pytest.raises(KeyError):
        storage.history("nope")
    with pytest.raises(AssertionError):
        storage.put_scalar("a", 1.0, smoothing_hint=False)


def test_name_scopes():
    storage = EventStorage()
    with storage.name_scope("stage0"):
        storage.put_scalar("a", 1.0)
        with storage.name_scope("inner/"):
            storage.put_scalars(a=2.0)
        storage.put_scalar("b", 3.0)
    storage.put_scalar("a", 4.0)
    scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert scalars == {"stage0/a": 1.0, "inner/a": 2.0, "stage0/b": 3.0, "a": 4.0}


def test_json_lines_are_appended_once(tmp_path):
    path = tmp_path / "metrics.json"
    for start in (0, 2):
        with EventStorage(start) as storage:
            writer = JSONWriter(str(path))
            storage.put_scalar("x", start + 0.5)
            writer.write()
            writer.write()
            writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 0, "x": 0.5}, {"iteration": 2, "x": 2.5}]


def test_tensorboard_files_are_made_at_the_first_write(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventStorage(4) as storage:
        writer = TensorboardXWriter(str(tmp_path))
        assert not list(tmp_path.iterdir())
        storage.put_scalar("x", 1.5)
        writer.write()
        writer.write()
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("x")] == [(4, 1.5)]


def test_printer_is_silent_after_training_and_without_times_has_no_eta(caplog):
    printer = CommonMetricPrinter(max_iter=2)
    printer.logger.propagate = True
    caplog.set_level("INFO", logger=printer.logger.name)
    caplog.clear()
    printer.logger.addHandler(caplog.handler)
    try:
        with EventStorage(1) as storage:
            storage.put_scalars(loss=2.0, other=1.0)
            storage.put_scalar("AP [metric]", 0.5)
            printer.write()
            storage.iter = 2
            printer.write()
    finally:
        printer.logger.removeHandler(caplog.handler)
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == 1
    message = messages.pop()
    assert "iter: 1  loss: 2  AP [metric]: 0.5  " in message and "lr: N/A" in message and "eta" not in message
