"""tools/export.py: what is kept, how files are named and described, what is refused; exported files are evaluated."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.apps.export import verification
from d2_distill.apps.export.checkpoint import to_half
from d2_distill.apps.export.runtime import ExportedDetector, load_exported
from d2_distill.checkpoint.exact import load_exactly
from d2_distill.data.registration import register_datasets
from d2_distill.engine.evaluate import load_detector
from d2_distill.engine.setup import load_config
from d2_distill.engine.trainer import Trainer, build_checkpointer
from d2_distill.evaluation.complexity import count_flops, count_parameters

from ..data.small_sets import CLASSES, write_coco
from ..same_detections import assert_same_detections
from ..small_detectors import batch, build, detector_cfg, distiller_cfg, save_teacher

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import export  # noqa: E402

CFG = {"RESNETS__NORM": "BN"}


@pytest.fixture
def saved(tmp_path):
    """A detector and its checkpoint, with a state of training beside it."""
    model = build(detector_cfg("RetinaNet", **CFG), salt=5).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    build_checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_final", iteration=7)
    return model, tmp_path / "model_final.pth"


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def exported(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_name_content_and_report(saved, tmp_path, monkeypatch, capsys):
    model, path = saved
    run(monkeypatch, "checkpoint", path, tmp_path / "out" / "student.pth")
    written = exported(tmp_path / "out")
    digest = hashlib.sha256(written.read_bytes()).hexdigest()
    assert written.name == f"student-{digest[:8]}.pth"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"Read  {path}: {path.stat().st_size / 1e6:.2f} MB",
        f"Wrote {written}: {written.stat().st_size / 1e6:.2f} MB",
        "Left out: iteration, optimizer",
    ]
    before = written.read_bytes()
    run(monkeypatch, "checkpoint", path, tmp_path / "out" / "student.pth")
    assert exported(tmp_path / "out").read_bytes() == before  # the same weights, the same name

    run(monkeypatch, "checkpoint", written, tmp_path / "again" / "student.pth")
    assert exported(tmp_path / "again").name == written.name
    assert capsys.readouterr().out.endswith("Left out: nothing\n")


@pytest.mark.parametrize("half", [False, True])
def test_loads_as_the_plain_student(saved, tmp_path, monkeypatch, half):
    model, path = saved
    run(monkeypatch, "checkpoint", path, tmp_path / "out" / "student.pth", *["--half"] * half)
    written = exported(tmp_path / "out")
    stored = torch.load(written, weights_only=True)["model"]
    assert {value.dtype for value in stored.values()} == {torch.half if half else torch.float32, torch.int64}

    plain = build(detector_cfg("RetinaNet", **CFG)).eval()
    load_exactly(plain, str(written), key="MODEL.WEIGHTS")
    for name, value in plain.state_dict().items():
        original = model.state_dict()[name]
        assert value.dtype == original.dtype
        torch.testing.assert_close(value, original, rtol=1e-3 if half else 0, atol=1e-6 if half else 0)
    if not half:
        for ours, theirs in zip(plain(batch()), model(batch())):
            ours, theirs = ours["instances"], theirs["instances"]
            assert len(ours) > 0 and torch.equal(ours.scores, theirs.scores)


R_CNN_ASSISTANT = {
    "ROI_HEADS__NAME": "StandardROIHeads",
    "ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD__NUM_FC": 2,
    "ROI_BOX_HEAD__FC_DIM": 32,
}
ASSIST_ONLY = {
    "DISTILL__HEAD__AKD_WEIGHT": 0.0, "DISTILL__HEAD__CKD_WEIGHT": 0.0, "DISTILL__HEAD__ASSISTANT_INIT": "fresh"
}


@pytest.mark.parametrize(
    "case, teacher_case, method, options",
    [
        ("RetinaNet", "GeneralizedRCNN", "HEAD", {}),
        ("OpenMMLabFCOS", "GeneralizedRCNN", "HEAD", {}),
        ("OpenMMLabRetinaNet", "ATSS", "HEAD", {}),
        ("GeneralizedRCNN", "GeneralizedRCNN cascade", "HEAD", {}),
        ("RetinaNet", None, "HEAD", {**R_CNN_ASSISTANT, **ASSIST_ONLY}),
        ("RetinaNet", None, "TFHEAD", R_CNN_ASSISTANT),
    ],
)
def test_assistants_leave_no_trace(tmp_path, monkeypatch, case, teacher_case, method, options):
    """After HEAD the exported student has the plain one's tensors and modules, and the same work to do."""
    teacher = None
    if teacher_case is not None:
        (tmp_path / "teacher").mkdir()
        teacher = save_teacher(tmp_path / "teacher", teacher_case)
    torch.manual_seed(0)
    assisted = build_model(distiller_cfg(case, teacher, [method], **options)).prepare_training()
    assert count_parameters(assisted) > 1.02 * count_parameters(assisted.student)
    optimizer = torch.optim.SGD(assisted.parameters(), lr=1e-3)
    with EventStorage():
        sum(assisted(batch()).values()).backward()
    optimizer.step()
    build_checkpointer(assisted, str(tmp_path)).save("model_final")
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["distill"]
    run(monkeypatch, "checkpoint", tmp_path / "model_final.pth", tmp_path / "out" / "student.pth")
    written = exported(tmp_path / "out")

    plain = build(detector_cfg(case)).eval()
    stored = torch.load(written, weights_only=True)["model"]
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    load_exactly(plain, str(written), key="MODEL.WEIGHTS")
    assert [(name, type(module)) for name, module in assisted.student.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assisted.eval()
    assert count_flops(assisted, batch()) == count_flops(plain, batch()) > 0
    with torch.no_grad():
        for ours, theirs in zip(plain(batch()), assisted(batch())):
            assert torch.equal(ours["instances"].scores, theirs["instances"].scores)


def test_counters_are_not_halved():
    counter, weight = torch.tensor(70001), torch.tensor([0.1, float("inf")], dtype=torch.float64)
    found = to_half({"norm.num_batches_tracked": counter, "weight": weight})
    assert found["norm.num_batches_tracked"] is counter and found["weight"].dtype == torch.half


def test_values_beyond_half_precision_are_refused(tmp_path, monkeypatch):
    torch.save({"model": {"norm.running_var": torch.tensor([1.0, 7e4])}}, tmp_path / "model.pth")
    with pytest.raises(SystemExit, match="error: --half: norm.running_var has values up to 7e.04, beyond"):
        run(monkeypatch, "checkpoint", tmp_path / "model.pth", tmp_path / "out" / "student.pth", "--half")
    assert not (tmp_path / "out").exists()


def bad_contents():
    yield "plain text", b"no checkpoint", "cannot be read as a checkpoint"
    weights = torch.zeros(1)
    for content in ([1], {"weight": weights}, {"model": {}}, {"model": weights}, {"model": {"a": 1}}):
        yield type(content).__name__, content, "has no weights under 'model'"


@pytest.mark.parametrize("name, content, message", bad_contents())
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, name, content, message):
    path = tmp_path / "bad.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit, match=f"error: The checkpoint: .*bad.pth {message}"):
        run(monkeypatch, "checkpoint", path, tmp_path / "out" / "student.pth")
    assert not (tmp_path / "out").exists()


def test_missing_file_and_wrong_ending(saved, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: The checkpoint: there is no file .*none.pth"):
        run(monkeypatch, "checkpoint", tmp_path / "none.pth", tmp_path / "student.pth")
    with pytest.raises(SystemExit, match="error: .*student.pkl must end with .pth"):
        run(monkeypatch, "checkpoint", saved[1], tmp_path / "student.pkl")


def test_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    """A folder has taken the name."""
    run(monkeypatch, "checkpoint", saved[1], tmp_path / "first" / "student.pth")
    taken = tmp_path / "second" / exported(tmp_path / "first").name
    taken.mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: .*student-"):
        run(monkeypatch, "checkpoint", saved[1], tmp_path / "second" / "student.pth")
    assert exported(tmp_path / "second") == taken


@pytest.fixture
def trained(tmp_path):
    """A config file with data of two classes, and its arguments behind the options of the tool."""
    cfg = detector_cfg("GFL", GFL__SCORE_THRESH_TEST=0.1)
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "DATALOADER.NUM_WORKERS", 0])
    row = write_coco(tmp_path / f"data_{tmp_path.name}")
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (row,), (row[0],), (row[0],)
    return with_weights(tmp_path, cfg)


def with_weights(folder: Path, cfg) -> list:
    (folder / "config.yaml").write_text(cfg.dump())
    sized = load_config(str(folder / "config.yaml"), [])
    torch.save({"model": build(sized, salt=5).state_dict()}, folder / "model.pth")
    return ["--config-file", folder / "config.yaml", "--rounds", 1], ["MODEL.WEIGHTS", folder / "model.pth"]


def test_torchscript_from_data_and_its_evaluation(trained, tmp_path, monkeypatch, capsys):
    options, values = trained
    target = tmp_path / "out" / "student.pt"
    run(monkeypatch, "torchscript", *options, "--output", target, *values)
    assert exported(tmp_path / "out") == target
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 images") and re.search(r"(\d+) of \1 match +yes", lines[2])
    assert re.match(r"Median time on 64 x 96, \d+ threads: eager \d+\.\d ms, exported \d+\.\d ms", lines[-2])
    assert lines[-1].startswith(f"Wrote {target}: ")

    description = load_exported(target).description
    assert description["class_names"] == list(CLASSES) and description["num_classes"] == 2
    assert (description["detector"], description["channel_order"]) == ("GFL", "BGR")
    assert (description["min_size_test"], description["max_size_test"]) == (64, 96)
    assert description["score_threshold"] == 0.1

    cfg = load_config(str(tmp_path / "config.yaml"), list(map(str, values)))
    register_datasets(cfg)
    model, detector = load_detector(cfg).eval(), ExportedDetector(load_exported(target))
    for inputs in Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        with torch.no_grad():
            expected, found = (each(inputs)[0]["instances"] for each in (model, detector))
        assert len(found) > 0 and found.image_size == expected.image_size == (inputs[0]["height"], inputs[0]["width"])
        assert_same_detections(found, expected)
    run(monkeypatch, "evaluate", *options[:2], target, *values)


def test_a_distillation_exports_its_student(tmp_path, monkeypatch, capsys):
    """No file of the teacher exists."""
    options, values = with_weights(tmp_path, distiller_cfg("GFL", None, ["TFHEAD"]))
    run(monkeypatch, "torchscript", *options, "--noise", "--output", tmp_path / "distilled.pt", *values)
    plain = [*values, "MODEL.META_ARCHITECTURE", "GFL"]
    run(monkeypatch, "torchscript", *options, "--noise", "--output", tmp_path / "plain.pt", *plain)
    first, second = (load_exported(tmp_path / f"{name}.pt") for name in ("distilled", "plain"))
    assert first.description == second.description and first.description["detector"] == "GFL"
    weights = [exported._graph.state_dict() for exported in (first, second)]
    assert weights[0].keys() == weights[1].keys()


def test_onnx_of_a_fixed_size_compared_on_a_picture(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime")
    options, values = trained
    target, picture = tmp_path / "out" / "raw.onnx", tmp_path / f"data_{tmp_path.name}" / "images" / "0.png"
    fixed = ["--raw", "--fixed-size", 64, 100, "--image", picture, "--output", target]
    run(monkeypatch, "onnx", *options, *fixed, *values)
    description = load_exported(target).description
    assert description["outputs"] == ["logits", "deltas", "scores", "boxes"]
    assert description["input_shape"] == ["N", 3, 64, 100] and description["fixed_size"] == [64, 100]
    with pytest.raises(SystemExit, match="error: .*raw.onnx has raw outputs; only detections can be evaluated"):
        run(monkeypatch, "evaluate", *options[:2], target)
    fixed[2:4] = 48, 48
    with pytest.raises(SystemExit, match="error: An image of 64 x 96 does not fit into --fixed-size 48 48"):
        run(monkeypatch, "onnx", *options, *fixed, "--overwrite", *values)


def test_a_graph_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    options, values = trained
    monkeypatch.setattr(verification, "RAW_TOLERANCE", -1.0)
    target = tmp_path / "out" / "raw.pt"
    with pytest.raises(SystemExit, match="error: .*raw.pt was not written: it differs from the detector"):
        run(monkeypatch, "torchscript", *options, "--raw", "--output", target, *values)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "command, arguments, values, message",
    [
        ("onnx", ["--output", "student.pt"], [], "student.pt must end with .onnx"),
        ("torchscript", ["--output", "student.pt"], ["TEST.NMS", "cluster_nms"], "TEST.NMS is 'cluster_nms', a loop"),
        ("torchscript", ["--output", "student.pt"], ["DATASETS.TEST", "()"], "DATASETS.TEST is empty; name pictures"),
        ("torchscript", ["--output", "student.pt", "--image", "no.png"], [], "--image no.png cannot be read as an"),
        ("evaluate", ["student.pt"], [], "There is no file student.pt"),
        ("evaluate", ["config.yaml"], [], "config.yaml: exported files end with .pt or .onnx"),
    ],
)
def test_what_cannot_be_exported_is_refused(trained, tmp_path, monkeypatch, command, arguments, values, message):
    if command == "onnx":
        pytest.importorskip("onnx", reason="ONNX files are written with onnx")
    options, weights = trained
    monkeypatch.chdir(tmp_path)
    options = options[:2] if command == "evaluate" else options
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        run(monkeypatch, command, *options, *arguments, *weights, *values)
    assert not (tmp_path / "student.pt").exists()


def test_a_graph_that_keeps_a_size_is_not_written(trained, tmp_path, monkeypatch):
    """Windows of Swin are shifted where a map is larger than they are, which the tracer decides once for all."""
    swin = {"BACKBONE__NAME": "build_swin_fpn_backbone", "FPN__TOP_BLOCK": "", "FPN__IN_FEATURES": ["res3", "res4", "res5"]}
    small = {"SWIN__EMBED_DIM": 12, "SWIN__DEPTHS": [2, 2, 2, 2], "SWIN__NUM_HEADS": [1, 2, 2, 2], "SWIN__WINDOW_SIZE": 4}
    options, values = with_weights(tmp_path, detector_cfg("GFL", **swin, **small))
    raw = ["--raw", "--noise", "--output", tmp_path / "out" / "raw.pt"]
    with pytest.raises(SystemExit, match="error: .*raw.pt was not written: it differs|The exported graph fails"):
        run(monkeypatch, "torchscript", *options, *raw, *values)


def test_a_file_is_not_overwritten_unasked(monkeypatch, tmp_path, capsys):
    (tmp_path / "student.pt").write_text("mine")
    with pytest.raises(SystemExit, match=r"--output: .*student.pt exists; name another path, or add --overwrite"):
        run(monkeypatch, "torchscript", "--config-file", "none.yaml", "--output", tmp_path / "student.pt")
    assert (tmp_path / "student.pt").read_text() == "mine"
