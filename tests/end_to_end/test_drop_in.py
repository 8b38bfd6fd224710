"""The folder works where it lies, e.g. below ``projects`` of a Detectron2 clone, without being installed."""

from __future__ import annotations

import shutil

import pytest

from .runs import ENVIRONMENT, ROOT, TINY, run_program, scalars, write_config

NOT_INSTALLED = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
RUN_HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, path
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy in the place of a Detectron2 project."""
    folder = tmp_path_factory.mktemp("clone") / "detectron2" / "projects" / "d2_distill"
    for name in ("d2_distill", "tools", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "datasets").mkdir()
    for path in (ROOT / "train_net.py", *(ROOT / "datasets").glob("*.py")):
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def test_train_net_in_the_project_folder(project, data):
    config = write_config(
        project / "configs" / "tiny.yaml", TINY, data, {"SOLVER": {"MAX_ITER": 1}, "OUTPUT_DIR": "output"}
    )
    run_program("train_net.py", "--config-file", config, cwd=project, environment=NOT_INSTALLED).succeeded()
    assert "bbox/AP" in scalars(project / "output")


def test_tools_from_anywhere(project, tmp_path):
    tools = sorted([*(project / "tools").glob("*.py"), *(project / "datasets").glob("*.py")])
    assert len(tools) >= 3
    outcome = run_program("-c", RUN_HELP, *tools, cwd=tmp_path, environment=NOT_INSTALLED).succeeded()
    assert outcome.stdout.count("usage: ") == len(tools)


def test_quick_start_data(project, tmp_path):
    pytest.importorskip("sklearn")
    script = project / "datasets" / "prepare_quickstart.py"
    arguments = ("--root", tmp_path, "--train-images", 2, "--val-images", 1)
    run_program(script, *arguments, cwd=tmp_path, environment=NOT_INSTALLED).succeeded()
    assert len(list((tmp_path / "quickstart" / "train").glob("*.jpg"))) == 2
