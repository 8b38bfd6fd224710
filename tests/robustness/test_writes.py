"""Runs that are killed, or refused by the disk, at each file that they write: nothing is lost, and they continue exactly."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from d2_distill.checkpoint.resuming import find_resumable
from d2_distill.engine.lock import lock_folder
from d2_distill.errors import UserError
from d2_distill.whole_files import whole_file

from ..data.small_sets import write_coco
from ..small_detectors import build, detector_cfg
from .command_line import Ended, call

ALL = os.environ.get("D2_DISTILL_ROBUSTNESS") == "all"
STEPS, PERIOD = 4, 2
TRAIN = ("train_net.py", "--config-file", "run.yaml", "--resume", "OUTPUT_DIR")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    row = write_coco(folder / "data")
    cfg = detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=2)
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (row,), (row[0],), (row[0],)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST = (32,), 32, 64, 64
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SEED = 0, 1, STEPS, 1
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = PERIOD, PERIOD
    (folder / "run.yaml").write_text(cfg.dump())
    cfg.SOLVER.MAX_ITER = STEPS + 1
    (folder / "longer.yaml").write_text(cfg.dump())
    assert call(*TRAIN, "whole", folder=folder).status == 0
    return folder


class Disturbed:
    """Counts what a process does to the files of a folder, and interferes with one of these acts.

    Args:
        folder: the part of the paths that tells them.
        at: number of the act; None counts only.
        kill: end the process there, after half of the bytes of a write; else refuse, as a full disk does.
    """

    def __init__(self, folder: str, at: int | None, kill: bool) -> None:
        self.folder, self.at, self.kill, self.acts = folder, at, kill, []

    def install(self) -> None:
        self._open, self._replace = io.open, os.replace
        builtins.open = io.open = self.open
        os.replace = self.replace

    def _act(self, name: str) -> bool:
        self.acts.append(name)
        return self.at is not None and len(self.acts) - 1 == self.at

    def _interfere(self) -> None:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(self, source, target) -> None:
        if self.folder in str(target) and self._act(f"replace {os.path.basename(target)}"):
            self._interfere()
        self._replace(source, target)

    def open(self, path, mode="r", *args, **kwargs):
        file = self._open(path, mode, *args, **kwargs)
        if isinstance(path, (str, os.PathLike)) and self.folder in str(path) and set(mode) & set("wax+"):
            if self._act(f"open {os.path.basename(path)}"):
                self._interfere()
            write, disturbed = file.write, self

            def writes(data):
                if disturbed._act(f"write {os.path.basename(path)}"):
                    write(data[: len(data) // 2])
                    file.flush()
                    disturbed._interfere()
                return write(data)

            try:
                file.write = writes
            except AttributeError:  # binary files have no such attribute to set
                file = _Wrapped(file, writes)
        return file


class _Wrapped:
    """A binary file whose writes are counted."""

    def __init__(self, file, write) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


def run(place: Path, folder: str, *, at: int | None = None, kill: bool = False, config: str = "run.yaml") -> tuple[Ended, list[str]]:
    """Train in a fork that is disturbed; how it ended, and what it did to its files, if it came to its end."""
    record = place / f"{folder}.acts"
    process = os.fork()
    if process == 0:
        disturbed = Disturbed(f"{folder}/", at, kill)
        os.register_at_fork(after_in_child=disturbed.install)
        command = [config if word == "run.yaml" else word for word in TRAIN]
        ended = call(*command, folder, folder=place, ending=lambda: record.write_text("\n".join(disturbed.acts)))
        (place / f"{folder}.ended").write_text(f"{ended.status}\n{ended.output}")
        os._exit(0)
    os.waitpid(process, 0)
    status, _, output = (place / f"{folder}.ended").read_text().partition("\n")
    return Ended(int(status), output), record.read_text().splitlines() if record.exists() else []


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_end(place: Path, folder: str) -> None:
    expected, found = (weights(place / name / "model_final.pth") for name in ("whole", folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.fixture(scope="module")
def acts(place) -> list[str]:
    ended, acts = run(place, "counted")
    assert ended.status == 0, ended.output
    assert_same_end(place, "counted")
    return acts


def chosen(acts: list[str], kill: bool) -> list[int]:
    """Return all acts, or the first of each kind, such as the writes to a file, and the last at what a run must not lose."""
    if ALL:
        return list(range(len(acts)))
    first, last = {}, {}
    for number, act in enumerate(acts):
        if not act.startswith("open"):
            first.setdefault(act, number)
        if act.startswith("replace") or "final" in act:
            last[act] = number
    # Every second one is killed, the others are refused; what a run must not lose is both.
    return sorted({*sorted(first.values())[kill::2], *last.values()})


def test_files_of_a_run_are_counted(acts):
    names = {act.split()[1] for act in acts}
    assert {"config.yaml", "metrics.json", "last_checkpoint", "model_final.partial.pth"} <= names
    assert {f"replace model_{PERIOD - 1:07d}.pth", "replace last_checkpoint", "replace model_final.pth"} <= set(acts)


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "no space"])
def test_each_write(place, acts, kill):
    for at in chosen(acts, kill):
        folder = f"{'killed' if kill else 'full'}_{at}"
        ended, _ = run(place, folder, at=at, kill=kill)
        where = f"{acts[at]} ({at}): {ended.output}"
        assert not ended.has_traceback, where
        if kill:
            assert ended.status == -signal.SIGKILL, where
        elif ended.status:
            assert ended.status == 1 and len(ended.errors) == 1 and "no space left" in ended.errors[0], where
        again = call(*TRAIN, folder, folder=place)
        assert again.status == 0 and not again.has_traceback, f"{where}\n{again.output}"
        assert_same_end(place, folder)
        shutil.rmtree(place / folder)


def _of(place: Path, name: str) -> Path:
    shutil.copytree(place / "whole", place / name)
    return place / name


def test_an_extended_run_keeps_its_only_checkpoint(place):
    """It is replaced by a whole one, or stays."""
    folder = _of(place, "extended")
    for path in folder.glob("model_0*.pth"):
        path.unlink()
    before = (folder / "model_final.pth").read_bytes()
    _, acts = run(place, "extended", config="longer.yaml")
    assert (folder / "model_final.pth").read_bytes() != before
    last = max(number for number, act in enumerate(acts) if act == "write model_final.partial.pth")
    shutil.rmtree(folder)
    folder = _of(place, "extended")
    for path in folder.glob("model_0*.pth"):
        path.unlink()
    run(place, "extended", at=last, kill=True, config="longer.yaml")
    assert (folder / "model_final.pth").read_bytes() == before
    assert find_resumable(str(folder)) == str(folder / "model_final.pth")


@pytest.mark.parametrize("pointer", [None, "", "model_0000009.pth", "../whole/model_final.pth", "/etc/passwd"])
def test_a_lost_pointer(place, pointer, caplog, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(place / "whole", folder)
    (folder / "last_checkpoint").unlink()
    if pointer is not None:
        (folder / "last_checkpoint").write_text(pointer)
    assert find_resumable(str(folder)) == str(folder / "model_final.pth")
    assert ("newest checkpoint that is whole" in caplog.text) == (pointer != "../whole/model_final.pth")


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed"])
def test_a_damaged_checkpoint_is_passed_over(place, damage, caplog, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(place / "whole", folder)
    path = folder / "model_final.pth"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content[: {"cut": len(content) // 2, "emptied": 0, "changed": len(content)}[damage]])
    assert find_resumable(str(folder)) == str(folder / f"model_{STEPS - 1:07d}.pth")
    assert "model_final.pth, which last_checkpoint names, is damaged or missing" in caplog.text


def test_a_pointer_may_be_set_back(place, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(place / "whole", folder)
    time.sleep(0.01)
    (folder / "last_checkpoint").write_text(f"model_{PERIOD - 1:07d}.pth")
    assert find_resumable(str(folder)) == str(folder / f"model_{PERIOD - 1:07d}.pth")


def test_a_checkpoint_newer_than_the_pointer(place, tmp_path, caplog):
    """The run was killed between the two."""
    folder = tmp_path / "run"
    shutil.copytree(place / "whole", folder)
    (folder / "last_checkpoint").write_text(f"model_{PERIOD - 1:07d}.pth")
    time.sleep(0.01)
    os.utime(folder / f"model_{STEPS - 1:07d}.pth")
    assert find_resumable(str(folder)) == str(folder / f"model_{STEPS - 1:07d}.pth")
    assert "but this one is newer" in caplog.text


def test_nothing_to_continue_from(tmp_path):
    assert find_resumable(str(tmp_path)) == find_resumable(str(tmp_path / "none")) == ""
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match="model_final.pth is damaged or without the state of the training"):
        find_resumable(str(tmp_path))


def test_two_runs_in_a_folder(place):
    """The second is refused; the lock of a process that is gone holds nobody up."""
    ready, wait = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        lock_folder(str(place / "shared"))
        os.write(ready[1], b"x")
        os.read(wait[0], 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(ready[0], 1)
    refused = call(*TRAIN, "shared", folder=place)
    assert refused.status == 1 and "in use by another run" in refused.errors[0] and not any((place / "shared").iterdir())
    os.write(wait[1], b"x")
    os.waitpid(process, 0)
    assert call(*TRAIN, "shared", folder=place).status == 0


def test_a_child_does_not_hold_the_lock(tmp_path):
    """Workers of a loader may outlive a killed run by some seconds."""
    ready, wait = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        lock_folder(str(tmp_path))
        if os.fork() == 0:
            os.write(ready[1], b"x")
            os.read(wait[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        os._exit(0)
    os.waitpid(process, 0)
    try:
        lock_folder(str(tmp_path))
    finally:
        os.write(wait[1], b"x")


def test_another_teacher_is_noticed(place):
    cfg = detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=2)
    torch.save({"model": build(cfg).state_dict()}, place / "teacher.pth")
    words = (
        "MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILL.STUDENT", "RetinaNet", "MODEL.DISTILL.METHODS", "('PKD',)",
        "MODEL.DISTILL.TEACHER.CONFIG_FILE", "run.yaml", "MODEL.DISTILL.TEACHER.WEIGHTS", "teacher.pth",
    )
    assert call(*TRAIN, "taught", *words, folder=place).status == 0
    before = {path: path.read_bytes() for path in (place / "taught").iterdir() if path.is_file()}
    torch.save({"model": build(cfg, salt=1).state_dict()}, place / "teacher.pth")
    ended = call(*TRAIN, "taught", *words, "SOLVER.MAX_ITER", "6", folder=place)
    assert ended.status == 1 and "the teacher's weights have changed" in ended.errors[0]
    assert before == {path: path.read_bytes() for path in (place / "taught").iterdir() if path.is_file()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_whole_files(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)), whole_file(target) as path:
        path.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "old"
    with whole_file(target) as path:
        path.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "new"
