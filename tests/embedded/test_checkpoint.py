"""DetectionCheckpointer beyond the recorded cases: round trips, forgiven keys, bad files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.checkpoint.catalog import ModelCatalog
from torch import nn


@pytest.fixture
def captured(monkeypatch):
    """Warnings of the checkpointer; its loggers do not propagate, so pytest's caplog sees none."""
    messages = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, message, *args: messages.append(str(message)))
    return messages


def test_resume_restores_the_model_and_what_was_saved_with_it(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("first", iteration=3)

    restored = nn.Linear(3, 2)
    restored_optimizer = torch.optim.SGD(restored.parameters(), lr=0.5, momentum=0.9)
    checkpointer = DetectionCheckpointer(restored, str(tmp_path), optimizer=restored_optimizer)
    assert checkpointer.has_checkpoint()
    rest = checkpointer.resume_or_load("unused.pth", resume=True)

    assert rest == {"iteration": 3}
    assert torch.equal(restored.weight, model.weight)
    assert restored_optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(restored_optimizer.state[restored.weight]["momentum_buffer"],
                       optimizer.state[model.weight]["momentum_buffer"])


def test_load_without_resume_leaves_the_optimizer_alone(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("first")
    optimizer.param_groups[0]["lr"] = 0.7
    rest = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load(
        str(tmp_path / "first.pth"), resume=False)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert list(rest) == ["optimizer"]


def test_nothing_is_written_where_saving_is_off(tmp_path):
    DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model")
    assert not list(tmp_path.iterdir())


def test_an_empty_path_loads_nothing():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    assert DetectionCheckpointer(model).load("") == {}
    assert torch.equal(model.weight, before)


def test_a_missing_file_is_named():
    with pytest.raises(AssertionError, match="nowhere.pth"):
        DetectionCheckpointer(nn.Linear(2, 2)).load("nowhere.pth")


def test_a_file_with_objects_is_refused(tmp_path):
    """Such a file could run code; the real Detectron2 refuses it too, by torch's default."""
    path = tmp_path / "objects.pth"
    torch.save({"model": {"weight": np.zeros((2, 2), dtype=np.float32)}}, path)
    with pytest.raises(pickle.UnpicklingError):
        DetectionCheckpointer(nn.Linear(2, 2)).load(str(path))


class _Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.register_buffer("pixel_mean", torch.full((1,), 5.0))


def test_missing_image_statistics_and_old_cell_anchors_are_no_warning(tmp_path, captured):
    state = _Detector().fc.state_dict(prefix="fc.")
    state["anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    torch.save({"model": state}, tmp_path / "old.pth")
    model = _Detector()
    DetectionCheckpointer(model).load(str(tmp_path / "old.pth"))
    assert captured == []
    assert model.pixel_mean.item() == 5.0


def test_other_missing_and_unexpected_keys_are_told(tmp_path, captured):
    torch.save({"model": {"fc.weight": torch.ones(1, 1), "fd.weight": torch.ones(1)}}, tmp_path / "other.pth")
    DetectionCheckpointer(_Detector()).load(str(tmp_path / "other.pth"))
    text = "\n".join(captured)
    assert "fc.bias" in text and "fd.weight" in text


def test_the_shape_in_question_is_told(captured):
    align_and_update_state_dicts({"a.weight": torch.zeros(2)}, {"weight": torch.zeros(3)}, False)
    assert "a.weight" in captured[0] and "3" in captured[0] and "2" in captured[0]


def test_caffe2_entries_without_a_match_are_renamed_only():
    result = align_and_update_state_dicts(
        {"backbone.stem.conv1.weight": torch.zeros(1)}, {"conv1_w": torch.ones(1), "other_w": torch.ones(2)})
    assert set(result) == {"backbone.stem.conv1.weight", "other.weight"}


def test_catalogue_addresses():
    assert ModelCatalog.get("ImageNetPretrained/MSRA/R-50") == (
        "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl")
    with pytest.raises((KeyError, RuntimeError)):
        ModelCatalog.get("nothing")
