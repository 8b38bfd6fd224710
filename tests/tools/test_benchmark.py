"""tools/benchmark.py on small detectors: what each arm computes, and what is printed and refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill import distiller
from d2_distill.detectors.building import build_detector
from d2_distill.evaluation.complexity import count_flops, count_parameters
from d2_distill.staged import Tap

from ..data.small_sets import WIDE, write_coco
from ..small_detectors import NUM_CLASSES, batch, build, detector_cfg, distiller_cfg, save_teacher

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import benchmark  # noqa: E402

RATIOS = ("distilled / (plain + teacher)", "distilled / plain", "terms / plain")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command and returns the lines that it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        benchmark.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers by case."""
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in ("RetinaNet", "GFL")}


@pytest.fixture
def teacher(teachers):
    return teachers["RetinaNet"]


def write(path: Path, cfg) -> Path:
    path.write_text(cfg.dump())
    return path


@pytest.mark.parametrize(
    "case, methods",
    [
        ("RetinaNet", ["CrossKD"]),
        ("RetinaNet BN", ["PKD", "FeatureImitation", "CrossKD"]),
        ("GFL", ["LD"]),
        ("GeneralizedRCNN", ["PKD"]),
    ],
)
def test_step(case, methods, teachers, tmp_path, call):
    """The teacher's weights are not asked for."""
    teacher = teachers[case if case in teachers else "RetinaNet"]
    cfg = distiller_cfg(case, teacher, methods, DISTILL__TEACHER__WEIGHTS="")
    config = write(tmp_path / "distilled.yaml", cfg)
    options = ("--image-size", 64, 96, "--batch-size", 1, "--steps", 2, "--warmup", 1, "--threads", 1)
    lines = call("step", "--config-file", config, *options, "SOLVER.BASE_LR", 0.001)
    arms = {line[:20].strip(): [float(number) for number in line[20:].split()] for line in lines[2:6]}
    assert list(arms) == ["plain student step", "teacher forward", "distilled step", "distillation terms"]
    assert all(median >= minimum > 0 for median, minimum in arms.values())
    ratios = dict(line.split(": ") for line in lines[6:])
    assert tuple(ratios) == RATIOS and all(float(ratio) > 0 for ratio in ratios.values())


def test_step_without_a_teacher(tmp_path, call):
    cfg = distiller_cfg("RetinaNet", None, ["TFHEAD"], DISTILL__TF_HEAD__RCNN_WEIGHT=0.0,
                        DISTILL__TF_HEAD__CROSS_RCNN_WEIGHT=0.0)
    config = write(tmp_path / "distilled.yaml", cfg)
    options = ("--image-size", 64, 96, "--batch-size", 1, "--steps", 2, "--warmup", 1, "--threads", 1)
    lines = call("step", "--config-file", config, *options)
    assert [line[:20].strip() for line in lines[2:5]] == [
        "plain student step", "distilled step", "distillation terms"
    ]
    assert [line.partition(":")[0] for line in lines[5:]] == list(RATIOS[1:])


def test_step_with_a_baseline(teacher, tmp_path, call):
    config = write(tmp_path / "distilled.yaml", distiller_cfg("RetinaNet", teacher, ["PKD", "CrossKD"]))
    baseline = ("--baseline", "MODEL.DISTILL.METHODS", "('PKD',)")
    options = ("--image-size", 64, 96, "--batch-size", 1, "--steps", 2, "--warmup", 1, "--threads", 1)
    lines = call("step", "--config-file", config, *baseline, *options, "SOLVER.BASE_LR", 0.001)
    assert [line[:20].strip() for line in lines[6:8]] == ["baseline step", "teacher's part"]
    name, ratio = lines[-1].split(": ")
    assert name == "distilled / (baseline + teacher's part)" and float(ratio) > 0
    assert lines[-2].startswith("distilled / baseline:")


def test_steps_are_counted_for_what_is_measured_now_and_then(teacher, tmp_path, call, monkeypatch):
    """Without that a benchmark of MODEL.DISTILL.BALANCE would time steps that measure nothing."""
    measured = []
    monkeypatch.setattr(distiller, "report_ratios", lambda *args, **kwargs: measured.append(args))
    config = write(tmp_path / "distilled.yaml", distiller_cfg("RetinaNet", teacher, ["PKD"]))
    options = ("--image-size", 64, 96, "--batch-size", 1, "--steps", 5, "--warmup", 1, "--threads", 1)
    call("step", "--config-file", config, *options, "SOLVER.BASE_LR", 0.001, "MODEL.DISTILL.GRADIENT_RATIO_PERIOD", 2)
    assert len(measured) == 3


@pytest.mark.parametrize("methods, heads", [(["PKD"], 0), (["PKD", "CrossKD"], 3)])
def test_teachers_part_is_what_the_step_runs_of_it(teacher, methods, heads):
    """CrossKD runs the teacher's head on three levels of its own features; what the student's run there is not counted."""
    model, calls = build_model(distiller_cfg("RetinaNet", teacher, methods)).prepare_training(), []
    with EventStorage():
        part = benchmark.teacher_part(model, batch())
    model.teacher.model.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    model.teacher.model.head.cls_score.register_forward_hook(lambda *args: calls.append(args[2].requires_grad))
    part()
    assert calls == ["backbone"] + [False] * heads


def test_terms_are_computed_alone(teacher):
    """What student and teacher have computed is given; the gradient there is that of the whole step."""
    methods = ["CrossKD", "PKD", "FeatureImitation"]
    model = build_model(distiller_cfg("RetinaNet", teacher, methods)).prepare_training().train()
    runs, calls = [], []
    inputs = batch()
    with EventStorage():
        terms = benchmark.distillation_terms(model, inputs)
        model.methods["PKD"].register_forward_pre_hook(lambda _, args: runs.append(args[0]))
        model.student.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
        model.student.head.cls_score.register_forward_hook(lambda *_: calls.append("head"))
        model.teacher.model.backbone.register_forward_hook(lambda *_: calls.append("teacher"))
        model.staged.assign = lambda *_: calls.append("assign")
        for _ in range(2):  # the second call finds no gradient of the first one
            terms()
        assert not calls and len(runs) == 2 and runs[0].features["p3"] is not runs[1].features["p3"]
        del model.staged.assign

        losses = model(inputs)
    whole = runs.pop()
    # The features are leaves of their own: CrossKD's gradient ends at the taps.
    crosskd = losses["loss_crosskd_cls"] + losses["loss_crosskd_box"]
    others = losses["loss_pkd"] + losses["loss_imitation"]
    for loss, points in ((crosskd, taps_of), (others, lambda run: list(run.features.values()))):
        expected = torch.autograd.grad(loss, points(whole), retain_graph=True)
        for run in runs:
            for ours, theirs in zip(points(run), expected):
                assert theirs.any()
                torch.testing.assert_close(ours.grad, theirs)


def taps_of(run):
    return [*run.taps["cls"][Tap(1)], *run.taps["box"][Tap(1)]]


def test_leaves_keep_what_needs_no_gradient():
    parameter, mask = torch.ones(2, requires_grad=True), torch.ones(2)
    value = {"a": [parameter * 2, mask], "b": (parameter,), "c": "text"}
    found = benchmark.leaves(value)
    assert found["a"][1] is mask and found["c"] == "text" and isinstance(found["b"], tuple)
    assert found["a"][0].is_leaf and found["a"][0].requires_grad and found["a"][0].tolist() == [2, 2]


def test_plain_config_has_no_distilled_step(teacher, tmp_path, call):
    config = write(tmp_path / "plain.yaml", detector_cfg("RetinaNet"))
    with pytest.raises(SystemExit, match="error: .*plain.yaml distils nothing; name a config with"):
        call("step", "--config-file", config)
    cfg = distiller_cfg("RetinaNet", teacher, ["PKD"], DISTILL__PKD__WEIGHT=0.0)
    config = write(tmp_path / "off.yaml", cfg)
    with pytest.raises(SystemExit, match="error: .*off.yaml distils nothing; give it MODEL.DISTILL.METHODS"):
        call("step", "--config-file", config)


@pytest.fixture
def config(tmp_path, teacher):
    """A distiller's config whose teacher does not exist, with nine test images."""
    row = write_coco(tmp_path, sizes=[WIDE] * 9, classes=("cat", "cow", "dog"))
    assert NUM_CLASSES == 3
    cfg = distiller_cfg("RetinaNet", teacher, ["PKD"], DISTILL__TEACHER__CONFIG_FILE="none.yaml")
    cfg.merge_from_list(["DATASETS.COCO", (row,), "DATASETS.TEST", (row[0],), "DATALOADER.NUM_WORKERS", 0])
    cfg.INPUT.MIN_SIZE_TEST = 32
    return write(tmp_path / "distilled.yaml", cfg)


@pytest.fixture
def student(tmp_path):
    torch.save({"model": build(detector_cfg("RetinaNet")).state_dict()}, tmp_path / "student.pth")
    return tmp_path / "student.pth"


@pytest.mark.parametrize("limit, counted", [((), 4), (("--max-images", 7), 2)])
def test_inference_on_the_test_set(config, student, call, limit, counted):
    """Nine images, of which the first five are not counted; no teacher is looked for."""
    options = ("--log-interval", 2, "--threads", 1, *limit)
    lines = call("inference", "--config-file", config, *options, "MODEL.WEIGHTS", student)
    expected = ["6 images", "8 images"] if counted == 4 else ["6 images"]
    assert [line.split(":")[0] for line in lines[:-1]] == expected
    found = re.fullmatch(r"Overall: ([\d.]+) images/s, median ([\d.]+) ms, (\d+) images, cpu", lines[-1])
    assert int(found[3]) == counted and float(found[1]) > 0 and float(found[2]) > 0


def test_inference_on_a_synthetic_image(tmp_path, call):
    """Without data, without weights."""
    config = write(tmp_path / "plain.yaml", detector_cfg("GeneralizedRCNN"))
    options = ("--image-size", 64, 96, "--max-images", 8, "--log-interval", 50, "--threads", 1)
    missing = ("DATASETS.COCO", "(('a', 'none.json', 'none'),)")
    lines = call("inference", "--config-file", config, *options, *missing)
    assert len(lines) == 1 and lines[0].endswith("3 images, cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("MODEL.WEIGHTS", "none.pth"), "MODEL.WEIGHTS: there is no file none.pth"),
        (("DATASETS.TEST", "()"), "DATASETS.TEST is empty; .*--image-size"),
        (("DATASETS.TEST", "('none',)"), "DATASETS.TEST names the data set 'none'"),
        (("--max-images", 5), "more than 5 images"),
    ],
)
def test_inference_that_cannot_be_is_one_sentence(config, call, arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        call("inference", "--config-file", config, *arguments)


def test_weights_of_another_model_are_refused(tmp_path, config, call):
    other = tmp_path / "other.pth"
    torch.save({"model": build(detector_cfg("RetinaNet", RETINANET__NUM_CONVS=1)).state_dict()}, other)
    with pytest.raises(SystemExit, match="error: MODEL.WEIGHTS: .*other.pth does not fit the model"):
        call("inference", "--config-file", config, "MODEL.WEIGHTS", other)


def test_students_in_turns(tmp_path, call):
    """Distilled ones are plain here; keys hold for all."""
    files = [write(tmp_path / f"{case}.yaml", detector_cfg(case)) for case in ("GFL", "RetinaNet")]
    options = ("--image-size", 64, 64, "--steps", 2, "--warmup", 1, "--threads", 1)
    lines = call("students", "--beside", files[1], *options, "--config-file", files[0], "MODEL.GFL.NUM_CONVS", 1)
    rows = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines[2:]}
    assert list(rows) == [str(path) for path in files]
    assert rows[str(files[0])][2] == rows[str(files[0])][4] == 1
    model = build(detector_cfg("GFL", GFL__NUM_CONVS=1))
    assert rows[str(files[0])][0] == pytest.approx(count_parameters(model) / 1e6, abs=0.005)
    assert all(value > 0 for value in rows[str(files[1])])


def test_size(tmp_path, call):
    """A pyramid on a small image is counted there."""
    cfg = detector_cfg(
        "OpenMMLabFCOS", BACKBONE__NAME="build_low_resolution_backbone", FPN__TOP_BLOCK="",
        LOW_RESOLUTION__BACKBONE="build_p3p7_resnet_fpn_backbone", RESNETS__RES2_OUT_CHANNELS=64,
        RESNETS__OUT_FEATURES=["res2", "res3", "res4", "res5"], FPN__IN_FEATURES=["res2", "res3", "res4", "res5"],
    )
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [16, 32, 64]
    lines = call("size", "--config-file", write(tmp_path / "a.yaml", cfg), "--image-size", 100, 120)
    assert lines[0] == "Image of 100 x 120, padded to 128 x 128"
    rows = {name: (float(size), float(flops)) for name, size, flops in (line.split() for line in lines[3:])}
    assert list(rows) == ["OpenMMLabFCOS", "backbone", "backbone.pyramid.bottom_up", "head"]
    model = build_detector(cfg).eval()
    for name, module in (("OpenMMLabFCOS", model), ("head", model.head)):
        assert rows[name][0] == pytest.approx(count_parameters(module) / 1e6, abs=1e-3)
    bottom_up = count_flops(model.backbone.bottom_up, torch.zeros(1, 3, 64, 64))
    assert rows["backbone.pyramid.bottom_up"][1] == pytest.approx(bottom_up / 1e9, abs=1e-3) and bottom_up > 1e7
    whole, backbone, _, head = (flops for _, flops in rows.values())
    assert whole == pytest.approx(backbone + head, abs=2e-3)


@pytest.mark.parametrize("method, trained", [("PKD", 0), ("FeatureImitation", 3 * (32 * 32 + 32))])
def test_size_of_what_a_step_adds(method, trained, teacher, tmp_path, call):
    cfg = distiller_cfg("RetinaNet", teacher, [method], DISTILL__TEACHER__WEIGHTS="")
    lines = call("size", "--config-file", write(tmp_path / "a.yaml", cfg), "--image-size", 400, 500)
    first = next(number for number, line in enumerate(lines) if line.startswith("training step"))
    rows = {line[:-40].strip(): [float(x) for x in line.split()[-2:]] for line in lines[first + 2 :]}
    student = build_detector(cfg).eval()
    image = {"image": torch.zeros(3, 400, 500)}
    backbone = count_flops(student.backbone, student.preprocess_image([image]).tensor)
    assert rows.pop("student") == pytest.approx(
        [count_parameters(student) / 1e6, count_flops(student, [image]) / 1e9], abs=1e-3
    )
    assert rows.pop("teacher's features") == pytest.approx(
        [count_parameters(student) / 1e6, backbone / 1e9], abs=1e-3
    )
    [(name, (parameters, flops))] = rows.items()
    assert name.startswith("methods") and parameters == pytest.approx(trained / 1e6, abs=1e-3)
    # 1x1 convolutions on the three levels of 416 x 512 pixels
    cells = sum(416 * 512 // stride**2 for stride in (8, 16, 32))
    assert flops == pytest.approx(cells * 32 * 32 / 1e9 if trained else 0, abs=1e-3)
