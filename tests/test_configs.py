"""Every config in configs/ builds: the detector, and for a distiller its teacher and methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2_distill.engine.setup import load_config
from d2_distill.methods import build_methods
from d2_distill.staged import stage_detector
from d2_distill.student import build_student
from d2_distill.teacher import Teacher, teacher_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def project_root(monkeypatch):
    """Configs name each other relative to the project's root, where train_net.py is started."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS)
def test_builds(path):
    cfg = load_config(path, [])
    student = stage_detector(build_student(cfg))
    assert student.num_classes > 0
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        return
    other = teacher_config(cfg)
    teacher = Teacher(build_student(other), input_format=other.INPUT.FORMAT)
    methods = build_methods(cfg, student, teacher)
    assert list(methods) == list(cfg.MODEL.DISTILL.METHODS)
    assert all(method.weights for method in methods.values())
