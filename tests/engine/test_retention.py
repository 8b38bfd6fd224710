"""Only the newest periodic checkpoints stay, also across a resume; nothing else is deleted."""

from __future__ import annotations

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import TrainerBase
from torch import nn

from d2_distill.engine.retention import RecentCheckpoints


class Run(TrainerBase):
    def __init__(self, folder, kept):
        super().__init__()
        self.checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(folder))
        self.register_hooks([RecentCheckpoints(self.checkpointer, 2, max_to_keep=kept)])

    def run_step(self):
        pass


def numbers(folder):
    """Steps of the periodic checkpoints that there are."""
    return sorted(int(path.stem[6:]) + 1 for path in folder.glob("model_[0-9]*.pth") if len(path.stem) == 13)


def train(folder, first, last, kept=2):
    Run(folder, kept).train(first, last)


def test_newest_ones_and_the_final_one(tmp_path):
    train(tmp_path, 0, 9)
    assert numbers(tmp_path) == [6, 8]
    assert (tmp_path / "model_final.pth").exists()


def test_resumed_run_deletes_those_of_the_earlier_one(tmp_path):
    train(tmp_path, 0, 6)
    train(tmp_path, 6, 8)
    assert numbers(tmp_path) == [6, 8]
    train(tmp_path, 8, 10)
    assert numbers(tmp_path) == [8, 10]


def test_fewer_are_kept_from_the_resume_on(tmp_path):
    train(tmp_path, 0, 8, kept=4)
    assert numbers(tmp_path) == [2, 4, 6, 8]
    train(tmp_path, 8, 9, kept=1)
    assert numbers(tmp_path) == [8]


def test_later_ones_of_an_abandoned_run_are_written_again(tmp_path):
    train(tmp_path, 0, 8, kept=4)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    train(tmp_path, 4, 7, kept=2)
    assert numbers(tmp_path) == [4, 6, 8]


def test_other_files_stay(tmp_path):
    names = ["model_best.pth", "model_000001.pth", "model_0000001.pth.bak", "mymodel_0000001.pth", "model_zoo.pth"]
    for name in names:
        torch.save({}, tmp_path / name)
    train(tmp_path, 0, 4, kept=1)
    train(tmp_path, 4, 8, kept=1)
    assert numbers(tmp_path) == [8]
    assert all((tmp_path / name).exists() for name in names)


def test_the_last_checkpoint_stays(tmp_path):
    train(tmp_path, 0, 8, kept=4)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    train(tmp_path, 8, 9, kept=1)
    assert numbers(tmp_path) == [4, 8]
