"""tools/check_teacher.py: its numbers are those of an evaluation, of the student's classes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from detectron2.checkpoint import DetectionCheckpointer

from d2_distill.data.registration import register_datasets
from d2_distill.engine.trainer import Trainer

from ..data.small_sets import TALL, WIDE, write_coco, write_voc
from ..small_detectors import SavedTeacher, build, detector_cfg, distiller_cfg

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_teacher  # noqa: E402

SMALL = {"INPUT.MIN_SIZE_TEST": 32, "INPUT.MAX_SIZE_TEST": 48, "DATALOADER.NUM_WORKERS": 0}
SUPERSET = ("bird", "dog", "cat")


def save(folder: Path, cfg, name: str) -> Path:
    cfg.merge_from_list([item for pair in SMALL.items() for item in pair])
    path = folder / f"{name}.yaml"
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def teacher(tmp_path) -> SavedTeacher:
    """FCOS with classes of its own, untrained."""
    cfg = detector_cfg("FCOS")
    cfg.DATASETS.CLASSES = SUPERSET
    DetectionCheckpointer(build(cfg, salt=1), str(tmp_path)).save("teacher")
    return SavedTeacher(str(save(tmp_path, cfg, "teacher")), str(tmp_path / "teacher.pth"))


@pytest.fixture
def distillation(teacher, tmp_path) -> Path:
    cfg = distiller_cfg("FCOS", teacher, ["CrossKD"], FCOS__NUM_CLASSES=2)
    cfg.DATASETS.COCO = (write_coco(tmp_path, [WIDE, TALL] * 4),)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO[0][0],)
    return save(tmp_path, cfg, "distillation")


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        check_teacher.main([*map(str, arguments)])
    assert "Traceback" not in capsys.readouterr().err
    return str(end.value.code)


def test_numbers(distillation, teacher, tmp_path, capsys):
    path = tmp_path / "out" / "check.json"
    student = detector_cfg("FCOS", FCOS__NUM_CLASSES=2)
    DetectionCheckpointer(build(student, salt=2), str(tmp_path)).save("student")
    check_teacher.main([
        "--config-file", str(distillation), "--student-weights", str(tmp_path / "student.pth"), "--json", str(path),
        "--probe", "2",
    ])
    printed, logged = capsys.readouterr()
    report = json.loads(path.read_text())
    assert "Teacher: 2 of its 3 classes, by name" in logged
    assert [row["name"] for row in report["classes"]] == ["cat", "dog"]
    assert [row["objects"] for row in report["classes"]] == [3, 4] and report["images"] == 8
    assert report["teacher"]["kind"] == "FCOS" and report["teacher"]["weights"] == teacher.weights
    assert "Verdict: not good enough to teach: its AP50 is" in printed
    assert len(report["probe"]["prepared_otherwise"]) == 3
    assert [child.name for child in path.parent.iterdir()] == ["check.json"]

    cfg = check_teacher.load_config(str(distillation), ["OUTPUT_DIR", str(tmp_path)])
    register_datasets(cfg)
    model = check_teacher.Teacher.from_config(cfg).model
    for found, model in ((report, model), (report["student"], build(student, salt=2))):
        expected = Trainer.test(cfg, model)["bbox"]
        assert {name: found[name] for name in ("AP", "AP50", "AP75")} == pytest.approx(
            {name: expected[name] for name in ("AP", "AP50", "AP75")}
        )


def test_own_config_on_pascal_voc(teacher, tmp_path, capsys):
    row = write_voc(tmp_path, [[("dog", 3, 4, 10, 9)]] * 6)
    names = (*row[:3], SUPERSET, row[4])
    options = ["DATASETS.VOC", f"({names!r},)", "DATASETS.TRAIN", f"('{row[0]}',)", "MODEL.WEIGHTS", teacher.weights]
    arguments = ["--config-file", teacher.config_file, "--on", "train", "--images", "3", "--probe", "0", *options]
    check_teacher.main(arguments)
    printed = capsys.readouterr().out
    assert f"3 images of {row[0]} (DATASETS.TRAIN)" in printed and "AP50 on" not in printed
    assert "3 objects are too few to tell" in printed
    assert "; none scores 0.5 or more\n" in printed or "% are right\n" in printed


def test_refusals(distillation, teacher, tmp_path, capsys):
    cfg = distiller_cfg("FCOS", None, ["TFHEAD"])
    lonely = save(tmp_path, cfg, "lonely")
    assert "names no teacher; set MODEL.DISTILL.TEACHER.CONFIG_FILE" in refusal(capsys, "--config-file", lonely)
    message = refusal(capsys, "--config-file", teacher.config_file, "MODEL.WEIGHTS", teacher.weights)
    assert "error: DATASETS.TEST is empty" in message
    message = refusal(capsys, "--config-file", distillation, "--student-weights", tmp_path / "none.pth")
    assert "error: --student-weights: there is no file" in message
    with pytest.raises(SystemExit, match="2"):
        check_teacher.main(["--config-file", str(distillation), "--images", "0"])
