"""The method of docs/own_method.md, in a file of the user's own, through train_net.py."""

from __future__ import annotations

import math
import re

import torch

from .runs import (
    QUIET,
    RECORDER,
    ROOT,
    TINY,
    checkpoint,
    distiller,
    losses,
    merged,
    scalars,
    write_config,
)

EXAMPLE = ROOT / "examples" / "channel_wise.py"
IMPORTS = {"IMPORTS": [str(EXAMPLE)]}


def own_method(data, teacher, *configs):
    return merged(TINY, data, distiller(teacher.config, teacher.weights, "CWD"), IMPORTS, *configs)


def test_the_page_shows_the_file_of_40_lines_at_most():
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_method.md").read_text(), flags=re.DOTALL)
    assert block == EXAMPLE.read_text() and len(block.splitlines()) <= 40


def test_it_trains_a_plain_student(server, data, plain, teacher, tmp_path):
    short = {"SOLVER": {"MAX_ITER": 2}, "OUTPUT_DIR": str(tmp_path / "out")}
    config = write_config(tmp_path / "config.yaml", own_method(data, teacher, QUIET, short))
    server.run("--config-file", config, "MODEL.DISTILL.CWD.TEMPERATURE", 2.0).succeeded()
    value = scalars(tmp_path / "out")["loss_cwd"]
    assert value > 0 and math.isfinite(value)
    ours, theirs = (checkpoint(path)["model"] for path in (tmp_path / "out" / "model_final.pth", plain.weights))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    # The run's own config names the file, too, and so can be read by everyone.
    opts = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "DATASETS.TEST", "()")
    server.run("--config-file", tmp_path / "out" / "config.yaml", "--eval-only", *opts).succeeded()


def test_its_adapters_are_beside_the_student(server, data, teacher, tmp_path):
    """Named on the command line; two processes."""
    wide = {"MODEL": {"FPN": {"OUT_CHANNELS": 64}}, "SOLVER": {"MAX_ITER": 1}, "OUTPUT_DIR": str(tmp_path / "out")}
    without = {"MODEL": {"DISTILL": {"METHODS": []}}, "IMPORTS": []}
    config = write_config(tmp_path / "config.yaml", own_method(data, teacher, QUIET, wide, without))
    opts = ("IMPORTS", f"('{EXAMPLE}',)", "MODEL.DISTILL.METHODS", "('CWD',)")
    server.run("--config-file", config, *opts, processes=2).succeeded()
    saved = checkpoint(tmp_path / "out" / "model_final.pth")
    levels = ("p3", "p4", "p5")
    assert saved["distill"].keys() == {f"CWD.adapters.{p}.{x}" for p in levels for x in ("weight", "bias")}
    assert not any("adapters" in name for name in saved["model"])


def test_with_weight_0_it_changes_no_bit(server, data, teacher, recorded, tmp_path):
    off = {"MODEL": {"DISTILL": {"CWD": {"WEIGHT": 0.0}}}, "OUTPUT_DIR": str(tmp_path / "out")}
    config = write_config(tmp_path / "config.yaml", own_method(data, teacher, QUIET, off))
    server.run("--config-file", config, script=RECORDER).succeeded()
    assert losses(tmp_path / "out") == losses(recorded.folder)
    ours, theirs = (checkpoint(folder / "model_final.pth")["model"] for folder in (tmp_path / "out", recorded.folder))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_file_that_is_not_there(server, data, teacher, tmp_path):
    config = write_config(tmp_path / "config.yaml", own_method(data, teacher, {"IMPORTS": ["none.py"]}))
    outcome = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "out")
    assert outcome.code == 1 and "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()
    [error] = outcome.errors
    assert "IMPORTS names none.py" in error and str(ROOT) in error


def test_a_file_with_an_error_shows_where(server, data, teacher, tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n\nno_such_name\n")
    config = write_config(tmp_path / "config.yaml", own_method(data, teacher, {"IMPORTS": [str(tmp_path / "mine.py")]}))
    outcome = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "out")
    assert outcome.code == 1 and "mine.py\", line 3" in outcome.stderr and "no_such_name" in outcome.stderr
