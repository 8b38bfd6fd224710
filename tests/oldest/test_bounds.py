"""`make test-oldest` installs the lower bounds of setup.py, and finds their Python or fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SEARCH = ("bash", str(FOLDER / "python.sh"))
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
OLDEST_PYTHON = re.search(r'python_requires=">=([\d.]+)"', SETUP).group(1)


def bounds(lines: list[str]) -> dict[str, Version]:
    """Package -> the version that its only specifier names; packages without any are left out."""
    requirements = [Requirement(line) for line in lines]
    return {
        each.name: Version(next(iter(each.specifier)).version) for each in requirements if len(each.specifier) == 1
    }


def test_constraints_are_the_lower_bounds():
    install_requires = re.search(r"install_requires=\[(.*?)\]", SETUP, flags=re.DOTALL).group(1)
    timm = re.search(r'^TIMM = "(.*?)"', SETUP, flags=re.MULTILINE).group(1)  # of the extras "timm" and "test"
    required = bounds([*re.findall(r'"(.*?)"', install_requires), timm])
    lines = (FOLDER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constrained = bounds([line for line in lines if line and not line.startswith("#")])
    assert constrained.pop("numpy") == Version("2")  # an upper bound, see the file
    assert len(required) >= 6 and constrained == required


def run_beside(shims: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command for which programs of a folder are the first on PATH, and its parent is the home."""
    environment = {"PATH": f"{shims}:/usr/bin:/bin", "HOME": str(shims.parent), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def fake_python(path: Path, version: str) -> Path:
    """A program that answers as a Python of a version; "" for one that fails, as a shim of pyenv may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def shims(tmp_path):
    """Programs that do not work."""
    for name in (f"python{OLDEST_PYTHON}", "uv"):
        fake_python(tmp_path / "shims" / name, "")
    return tmp_path / "shims"


@pytest.mark.parametrize("place", ["path", "pyenv", "variable"])
def test_the_oldest_python_is_found(shims, place):
    versions = shims.parent / ".pyenv" / "versions"
    fake_python(versions / f"{OLDEST_PYTHON}.1" / "bin" / "python", "3.8")
    path, variables = {
        "path": (shims / f"python{OLDEST_PYTHON}", {}),
        "pyenv": (versions / f"{OLDEST_PYTHON}.18" / "bin" / "python", {}),
        "variable": (shims / "mine", {"OLDEST_PYTHON": str(shims / "mine")}),
    }[place]
    fake_python(path, OLDEST_PYTHON)
    found = run_beside(shims, *SEARCH, **variables)
    assert (found.returncode, found.stdout) == (0, f"{path}\n"), found


def test_without_the_oldest_python_the_search_fails(shims):
    found = run_beside(shims, *SEARCH)
    assert found.returncode == 1 and not found.stdout
    assert f"There is no Python {OLDEST_PYTHON}" in found.stderr and "SKIP_OLDEST=1" in found.stderr


@pytest.mark.parametrize("options, succeeds", [([], False), (["SKIP_OLDEST=1"], True)])
def test_its_absence_is_a_failure_unless_allowed(shims, options, succeeds):
    outcome = run_beside(shims, "make", "test-oldest", f"OLDEST_VENV={shims / 'environment'}", *options)
    assert (outcome.returncode == 0) is succeeds, outcome
    assert "There is no Python" in outcome.stderr and ("test-oldest: skipped" in outcome.stdout) is succeeds
    assert not (shims / "environment").exists()


@pytest.mark.skipif(not os.environ.get("OLDEST_VERSIONS"), reason="only `make test-oldest` installs the oldest versions")
def test_the_oldest_versions_run():
    """So that the other tests of this run say something about them."""
    import torch
    import torchvision

    assert "%d.%d" % sys.version_info[:2] == OLDEST_PYTHON
    for module, bound in ((torch, "torch>=(.*?)"), (torchvision, "torchvision>=(.*?)")):
        expected = re.search(f'"{bound}"', SETUP).group(1)
        assert module.__version__.startswith(f"{expected}."), module.__version__
