"""``import d2_distill`` in a fresh interpreter: it registers everything, and exports what docs/python.md lists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d2_distill

from .end_to_end.runs import ENVIRONMENT, ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SCRIPT = re.findall(r"^```python\n(import d2_distill\n.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[0]
PROGRAMS = sorted([ROOT / "train_net.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("*.py")])
ON_CPU = 'cfg.MODEL.DEVICE = "cpu"\n'
# What the script has made, and what came with it.
REPORT = """
import json, sys
from d2_distill import DISTILL_METHOD_REGISTRY
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
print(json.dumps({
    "model": type(model).__name__,
    "student": type(model.student).__name__,
    "modules": sorted(sys.modules),
    "methods": [name for name, _ in DISTILL_METHOD_REGISTRY],
    "registered": [name for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY) for name, _ in registry],
}))
"""


def run(script: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # no warning either
    return done.stdout


def test_the_readme_has_the_script():
    assert f"```python\n{SCRIPT}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{ON_CPU.strip()}`" in PAGE


def test_the_script_builds_a_distiller():
    """Of the quick start, whose teacher need not be trained."""
    report = json.loads(run(SCRIPT.replace("model =", ON_CPU + "model =") + REPORT))
    assert report["model"] == "Distiller" and report["student"] == "RetinaNet"
    assert not [name for name in report["modules"] if name.startswith("d2_distill.embedded")]
    assert {"CrossKD", "PKD", "LD", "HEAD"} <= set(report["methods"])
    assert {"GFL", "MultiScaleDetector", "build_swin_fpn_backbone", "StudentFeatures"} <= {*report["registered"]}


def test_the_page_lists_the_exported_names():
    table = PAGE.partition("## The names")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(d2_distill.__all__)
    assert all(hasattr(d2_distill, name) for name in d2_distill.__all__)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_programs_import_it_before_detectron2(program):
    """Only it makes the embedded Detectron2 importable."""
    names = []
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.partition(".")[0])
    assert "detectron2" not in names or "d2_distill" in names[: names.index("detectron2")]
