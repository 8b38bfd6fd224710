"""MSAD by train_net.py: teacher and student, in several processes, killed and resumed, on the CPU."""

from __future__ import annotations

import pytest

from .runs import (
    QUIET,
    RECORDER,
    TINY,
    assert_same_run,
    average_precision,
    checkpoint,
    distiller,
    losses,
    scalars,
    write_config,
)

STAGES = ["res2", "res3", "res4", "res5"]
LEVELS = {
    "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64]]},
    "RETINANET": {"IN_FEATURES": ["p3", "p4", "p5", "p6"]},
    "MOBILENETV2": {"WIDTH_MULT": 0.125},
}
PYRAMID = "build_mobilenet_v2_fpn_backbone"
TEACHER = {
    "MODEL": {
        **LEVELS,
        "META_ARCHITECTURE": "MultiScaleDetector",
        "MSAD": {"DETECTOR": "RetinaNet"},
        "BACKBONE": {"NAME": PYRAMID},
        "FPN": {"IN_FEATURES": STAGES, "TOP_BLOCK": "P6"},
    }
}
STUDENT = {
    "MODEL": {
        **LEVELS,
        "BACKBONE": {"NAME": "build_low_resolution_backbone"},
        "LOW_RESOLUTION": {"BACKBONE": PYRAMID},
        "FPN": {"IN_FEATURES": STAGES, "TOP_BLOCK": ""},
        "DISTILL": {
            "INHERIT": ["backbone.pyramid=detector.backbone", "head=detector.head"],
            "MSAD": {"SCHEDULE": [["Warmup", 10]]},
        },
    }
}


@pytest.fixture(scope="module")
def student(server, data, runs):
    """Config of a student; two processes have trained its teacher: DDP wants a gradient for every parameter."""
    teacher = write_config(runs / "msad_teacher.yaml", TINY, data, TEACHER, {"SOLVER": {"MAX_ITER": 3}})
    folder = runs / "msad_teacher"
    outcome = server.run("--config-file", teacher, "OUTPUT_DIR", folder, processes=2).succeeded()
    names = {f"loss_{term}_{branch}" for term in ("cls", "box_reg") for branch in ("hr", "lr", "fr")}
    assert names <= set(scalars(folder)) and len(average_precision(outcome)) == 3
    special = distiller(teacher, folder / "model_final.pth", "MSAD")
    return write_config(runs / "msad_student.yaml", TINY, data, special, STUDENT)


def test_killed_student_resumes_exactly(server, student, tmp_path):
    """With its weights, optimiser and warm-up; it does not inherit again."""
    config = write_config(tmp_path / "config.yaml", {"_BASE_": str(student)}, QUIET)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    server.run("--config-file", config, "OUTPUT_DIR", whole, script=RECORDER).succeeded()
    rows = losses(whole)
    assert rows[0]["loss_msad"] == 0 and rows[-1]["loss_msad"] > 0
    arguments = ("--config-file", config, "--resume", "OUTPUT_DIR", killed)
    assert server.run(*arguments, script=RECORDER, SIGNAL_AT="SIGKILL 5 0").code == 128 + 9
    server.run(*arguments, script=RECORDER).succeeded()
    assert_same_run(killed, whole, iterations=[*range(5), *range(3, 8)])
    assert scalars(whole)["msad/raw"] > rows[-1]["loss_msad"]


def test_two_processes_train_a_student_that_is_evaluated_alone(server, student, tmp_path):
    out = tmp_path / "out"
    server.run("--config-file", student, "OUTPUT_DIR", out, "SOLVER.MAX_ITER", 3, processes=2).succeeded()
    assert "bbox/AP" in scalars(out) and "loss_msad" in scalars(out)
    names = checkpoint(out / "model_final.pth")["model"]
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}
    arguments = ("--config-file", student, "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth")
    no_teacher = ("MODEL.DISTILL.TEACHER.CONFIG_FILE", "absent.yaml", "OUTPUT_DIR", tmp_path / "evaluation")
    assert len(average_precision(server.run(*arguments, *no_teacher).succeeded())) == 3
