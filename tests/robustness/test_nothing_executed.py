"""Files that ask for code to be run: no program does, each refuses in a sentence, and there is one switch."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from d2_distill.checkpoint.exact import DataCheckpointer, load_exactly
from d2_distill.checkpoint.harmless import require_harmless
from d2_distill.config.reading import read_config
from d2_distill.config.trust import SWITCH
from d2_distill.errors import UserError

from ..data.small_sets import write_coco
from ..small_detectors import build, detector_cfg
from .command_line import call

MARKER = "it_ran"


class Payload:
    """Makes a folder in the working directory when it is unpickled."""

    def __init__(self, path: Path | str = MARKER) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": {"a": np.zeros(3)}, "__author__": Payload()}))


def _caffe2(path: Path) -> None:
    path.write_bytes(pickle.dumps({"blobs": {"conv1_w": Payload()}}, protocol=2))


def _zipped(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}, "trainer": Payload()}, path)


def _legacy(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}, "trainer": Payload()}, path, _use_new_zipfile_serialization=False)


def _bytes_within(path: Path) -> None:
    """Tensors in a plain pickle come with bytes of torch.save, which torch itself would read without a limit."""
    content = io.BytesIO()
    torch.save(Payload(), content)

    class Tensor:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (content.getvalue(),)

    path.write_bytes(pickle.dumps({"model": {"a": Tensor()}, "__author__": "x"}))


def _program(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 3)).save(str(path))


WEIGHTS = {
    "detectron.pkl": _pickle,
    "caffe2.pkl": _caffe2,
    "bytes.pkl": _bytes_within,
    "zip.pth": _zipped,
    "legacy.pth": _legacy,
    "pycls.pyth": _zipped,
    "program.pth": _program,
}
TAGS = {
    "apply": f"!!python/object/apply:os.mkdir [{MARKER}]",
    "new": f"!!python/object/new:os.mkdir [{MARKER}]",
    "eval": f"""!!python/object/apply:eval ["__import__('os').mkdir('{MARKER}')"]""",
    "attribute in eval": '!!python/object/apply:eval ["[].__class__"]',
    "name": "!!python/name:os.mkdir ''",
    "module": "!!python/module:os ''",
    "object": "!!python/object:collections.Counter {}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data set, a student's config, one that distils, and a run."""
    folder = tmp_path_factory.mktemp("place")
    row = write_coco(folder / "data")
    cfg = detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=2)
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (row,), (row[0],), (row[0],)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 0, 1, 1
    cfg.OUTPUT_DIR = "output"
    (folder / "student.yaml").write_text(cfg.dump())
    torch.save({"model": build(cfg).state_dict()}, folder / "good.pth")
    cfg.MODEL.DISTILL.STUDENT = "RetinaNet"
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILL.METHODS = "Distiller", ("PKD",)
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE, cfg.MODEL.DISTILL.TEACHER.WEIGHTS = "student.yaml", "good.pth"
    (folder / "distilled.yaml").write_text(cfg.dump())
    for name, write in WEIGHTS.items():
        write(folder / name)
    return folder


STUDENT, DISTILLED = ("--config-file", "student.yaml"), ("--config-file", "distilled.yaml")
# Program and its arguments, of which "?" is the file.
READERS_OF_WEIGHTS = {
    "training": ("train_net.py", *STUDENT, "MODEL.WEIGHTS", "?"),
    "evaluation": ("train_net.py", *STUDENT, "--eval-only", "MODEL.WEIGHTS", "?"),
    "teacher": ("train_net.py", *DISTILLED, "MODEL.DISTILL.TEACHER.WEIGHTS", "?"),
    "--teacher": ("train_net.py", *STUDENT, "--teacher", "student.yaml", "?"),
    "check_teacher": ("tools/check_teacher.py", *DISTILLED, "MODEL.DISTILL.TEACHER.WEIGHTS", "?"),
    "predict": ("tools/predict.py", *STUDENT, "--input", "data/images", "--output", "seen", "MODEL.WEIGHTS", "?"),
    "show_regions": ("tools/show_regions.py", *STUDENT, "--output", "seen", "MODEL.WEIGHTS", "?"),
    "export": ("tools/export.py", "torchscript", *STUDENT, "--output", "new.pt", "MODEL.WEIGHTS", "?"),
    "export checkpoint": ("tools/export.py", "checkpoint", "?", "new.pth"),
    "openmmlab": ("tools/convert_openmmlab.py", "?", "new.pth"),
    "msad": ("tools/convert_msad.py", *STUDENT, "?", "new.pth"),
    "torchvision": ("tools/convert_torchvision_detector.py", "?", "new.pth"),
    "backbone": ("tools/convert_torchvision_backbone.py", "?", "new.pkl"),
}
READERS_OF_CONFIGS = {
    "training": ("train_net.py", "--config-file", "?"),
    "list": ("train_net.py", "--list", "--config-file", "?"),
    "evaluation": ("train_net.py", "--eval-only", "--config-file", "?"),
    "teacher": ("train_net.py", *DISTILLED, "MODEL.DISTILL.TEACHER.CONFIG_FILE", "?"),
    "--teacher": ("train_net.py", *STUDENT, "--teacher", "?", "good.pth"),
    "check_teacher": ("tools/check_teacher.py", "--config-file", "?"),
    "check_data": ("tools/check_data.py", "--config-file", "?"),
    "predict": ("tools/predict.py", "--config-file", "?", "--input", "data/images"),
    "show_regions": ("tools/show_regions.py", "--config-file", "?", "--output", "seen"),
    "export": ("tools/export.py", "torchscript", "--config-file", "?", "--output", "new.pt"),
    "benchmark": ("tools/benchmark.py", "step", "--config-file", "?"),
    "msad": ("tools/convert_msad.py", "--config-file", "?", "good.pth", "new.pth"),
}


def refused(place: Path, command: tuple[str, ...], file: str) -> str:
    """The sentence with which a program refuses a file; it leaves nothing, and has run nothing."""
    before = sorted(place.rglob("*"))
    ended = call(*(file if word == "?" else word for word in command), folder=place)
    assert not (place / MARKER).exists()
    assert ended.status != 0 and not ended.has_traceback, ended.output
    assert len(ended.errors) == 1, ended.output
    assert sorted(place.rglob("*")) == before
    return ended.errors[0]


@pytest.mark.parametrize("reader", READERS_OF_WEIGHTS)
@pytest.mark.parametrize("file", ["detectron.pkl", "zip.pth"])
def test_programs_that_read_weights(place, reader, file):
    command = READERS_OF_WEIGHTS[reader]
    assert file in refused(place, command, file)


@pytest.mark.parametrize("file", WEIGHTS)
def test_kinds_of_weights(place, file, monkeypatch):
    monkeypatch.chdir(place)
    for load in (lambda: DataCheckpointer(nn.Linear(2, 3)).load(file), lambda: load_exactly(nn.Linear(2, 3), file, key="K")):
        with pytest.raises(UserError, match=rf"{file} (contains more than tensors.*(mkdir|posix)|is a TorchScript program)"):
            load()
        assert not (place / MARKER).exists()
    if file != "program.pth":
        with pytest.raises(UserError, match=SWITCH):
            require_harmless(file)


@pytest.mark.parametrize("file", ["detectron.pkl", "zip.pth", "legacy.pth"])
def test_the_switch_lets_weights_run(place, file, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv(SWITCH, "1")
    try:
        DataCheckpointer(nn.Linear(2, 3)).load(file)
        assert (place / MARKER).exists()
    finally:
        (place / MARKER).rmdir()


@pytest.mark.parametrize("reader", READERS_OF_CONFIGS)
def test_programs_that_read_configs(place, reader):
    path = place / "bad.yaml"
    path.write_text(f"_BASE_: student.yaml\nMODEL:\n  WEIGHTS: {TAGS['apply']}\n")
    try:
        message = refused(place, READERS_OF_CONFIGS[reader], "bad.yaml")
    finally:
        path.unlink()
    assert "bad.yaml, line 3: the tag !!python/object/apply:os.mkdir" in message and SWITCH in message


def test_a_run_that_is_compared(place):
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"OUTPUT_DIR: {TAGS['apply']}\n")
    (run / "metrics.json").write_text('{"iteration": 0, "bbox/AP": 1.0}\n')
    assert "config.yaml, line 1" in refused(place, ("tools/compare.py", "--unfinished", "?"), "run")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["file", "base"])
def test_tags(tmp_path, monkeypatch, tag, where):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(f"OUTPUT_DIR: out\nMODEL: {{WEIGHTS: {TAGS[tag]}}}\n")
    Path("based.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(UserError, match=r"bad.yaml, line 2: the tag !!python/.*D2_DISTILL_TRUST_FILES=1"):
        read_config("bad.yaml" if where == "file" else "based.yaml", (), source="The config")
    assert not Path(MARKER).exists()


def test_the_switch_lets_configs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SWITCH, "1")
    Path("asks.yaml").write_text("OUTPUT_DIR: !!python/object/apply:os.path.join [a, b]\n")
    assert read_config("asks.yaml", (), source="The config").OUTPUT_DIR == "a/b"


def test_what_detectrons_configs_need(tmp_path):
    """Computed anchor sizes, and tuples in both spellings."""
    (tmp_path / "ok.yaml").write_text(
        "MODEL:\n  ANCHOR_GENERATOR:\n"
        '    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64]]"]\n'
        'INPUT: {MIN_SIZE_TRAIN: "(640, 672)", MAX_SIZE_TRAIN: 900}\n'
        "SOLVER: {STEPS: !!python/tuple [3, 4]}\nDATASETS: {TRAIN: !!python/tuple [a, b]}\n"
    )
    cfg = read_config(str(tmp_path / "ok.yaml"), (), source="The config")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64)]
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672) and cfg.SOLVER.STEPS == (3, 4) and cfg.DATASETS.TRAIN == ("a", "b")


@pytest.mark.parametrize("expression", ["9**9**9", "[0] * 10**9", "x", "f(1)", "(lambda: 1)()", "1 if 1 else 2", "'a' * 99"])
def test_what_no_config_needs_to_compute(tmp_path, expression):
    (tmp_path / "a.yaml").write_text(f'OUTPUT_DIR: !!python/object/apply:eval ["{expression}"]\n')
    with pytest.raises(UserError, match="line 1: the tag"):
        read_config(str(tmp_path / "a.yaml"), (), source="The config")


@pytest.mark.parametrize("text, match", [
    ("A: 1\nMODEL:\n  WEIGHTS: a\nSOLVER: {}\nMODEL:\n  DEVICE: cpu\n", "the key MODEL twice, in lines 2 and 5"),
    ("MODEL:\n  WEIGHTS: a\n  DEVICE: cpu\n  WEIGHTS: b\n", "the key WEIGHTS twice, in lines 2 and 4"),
    ("_BASE_: a.yaml\n", "based on itself"),
    ("_BASE_: b.yaml\n", "b.yaml, which .*a.yaml names in _BASE_, does not exist"),
    ("- 1\n", "is a list, not a mapping"),
])
def test_malformed_files(tmp_path, text, match):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=match):
        read_config(str(tmp_path / "a.yaml"), (), source="The config")


def test_dumped_configs_are_read_again(tmp_path):
    cfg = detector_cfg("GFL")
    cfg.SOLVER.STEPS, cfg.DATASETS.COCO = (1, 2), (("a", "b", "c"),)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = read_config(str(tmp_path / "config.yaml"), (), source="The config")
    assert yaml.safe_load(found.dump()) == yaml.safe_load(cfg.dump())


def test_imports_of_another_folder_are_named_first(tmp_path, monkeypatch, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").write_text("raise RuntimeError('it runs')\n")
    (tmp_path / "mine" / "a.yaml").write_text(f"IMPORTS: ['{tmp_path}/mine/code.py']\n")
    for folder, is_named in ((tmp_path, False), (tmp_path / "elsewhere", True)):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        caplog.clear()
        with pytest.raises(RuntimeError, match="it runs"):
            read_config(str(tmp_path / "mine" / "a.yaml"), (), source="The config")
        assert ("outside of the working directory" in caplog.text and "code.py" in caplog.text) == is_named


def _numbers() -> dict[str, Any]:
    return {"weight": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.float32([1, 2, 3])}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["detectron", "tensors", "ordered"])
def test_detectrons_pickles_load(tmp_path, form, protocol):
    model = {
        "detectron": _numbers(),
        "tensors": {name: torch.from_numpy(value) for name, value in _numbers().items()},
        "ordered": collections.OrderedDict(_numbers()),
    }[form]
    content = {"model": model, "__author__": "third_party", "when": np.float64(1), "tags": {"a"}, "raw": b"\xff\x00"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    target = nn.Linear(2, 3)
    load_exactly(target, str(tmp_path / "a.pkl"), key="K")
    assert target.weight.tolist() == _numbers()["weight"].tolist() and target.bias.tolist() == [1, 2, 3]


def test_caffe2s_pickles_load(tmp_path):
    blobs = {"conv1_w": np.ones((4, 3, 2, 2), np.float32), "conv1_w_momentum": np.zeros(1)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    model = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 2, bias=False)})})
    checkpointer = DataCheckpointer(model)
    checkpointer.load(str(tmp_path / "a.pkl"))
    assert (model["stem"]["conv1"].weight == 1).all()


def test_files_named_after_a_data_set_stay_in_their_folder(place):
    row = ("../../escaped", str(place / "data" / "set.json"), str(place / "data" / "images"))
    ended = call(
        "tools/check_data.py", "--draw", "samples", "--config-file", "student.yaml", "DATASETS.COCO", repr((row,)),
        "DATASETS.TRAIN", repr((row[0],)), "DATASETS.TEST", "()", folder=place,
    )
    assert ended.status != 0 and "use no slashes" in ended.output and not ended.has_traceback
    assert not any((place / "samples").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reader", ["training", "evaluation", "teacher", "check_teacher", "predict", "export", "export checkpoint"])
def test_numbers_that_are_none(place, reader, value):
    state = torch.load(place / "good.pth", weights_only=True)["model"]
    next(iter(state.values())).view(-1)[0] = value
    torch.save({"model": state}, place / "broken.pth")
    try:
        message = refused(place, READERS_OF_WEIGHTS[reader], "broken.pth")
    finally:
        (place / "broken.pth").unlink()
    assert f"broken.pth holds NaN or infinite numbers in 1 of {len(state)} tensors (" in message


def test_weights_that_fit_nothing(place):
    state = torch.load(place / "good.pth", weights_only=True)["model"]
    for name, renamed, hint in (
        ("prefix.pth", {f"student.{key}": value for key, value in state.items()}, "'student.', which the model's lack"),
        ("other.pth", {f"x{index}": value for index, value in enumerate(state.values())}, "Name other weights"),
        ("mm.pth", {"neck.a": torch.zeros(1), "bbox_head.b": torch.zeros(1)}, "tools/convert_openmmlab.py"),
    ):
        torch.save({"model": renamed}, place / name)
        try:
            for reader in ("training", "evaluation"):
                message = refused(place, READERS_OF_WEIGHTS[reader], name)
                assert len(message) < 2000 and (hint in message or reader == "evaluation" and name == "other.pth")
        finally:
            (place / name).unlink()


def test_a_program_is_recognized(tmp_path):
    _program(tmp_path / "a.pth")
    assert zipfile.is_zipfile(tmp_path / "a.pth")
    with pytest.raises(UserError, match="TorchScript"):
        require_harmless(str(tmp_path / "a.pth"))


def test_a_lazy_config_is_recognized(place):
    (place / "lazy.py").write_text(f"import os\nos.mkdir('{MARKER}')\n")
    try:
        assert "LazyConfig" in refused(place, READERS_OF_CONFIGS["teacher"], "lazy.py")
    finally:
        (place / "lazy.py").unlink()
