"""tools/export_student.py: what is kept, how the file is named, what is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.checkpoint import load_exactly
from d2_distill.engine.trainer import build_checkpointer
from d2_distill.evaluation.complexity import count_flops, count_parameters

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, save_teacher

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import export_student  # noqa: E402

CFG = {"RESNETS__NORM": "BN"}


@pytest.fixture
def saved(tmp_path):
    """A detector and its checkpoint, with a state of training beside it."""
    model = build(detector_cfg("RetinaNet", **CFG), salt=5).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    build_checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_final", iteration=7)
    return model, tmp_path / "model_final.pth"


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export_student.py", *map(str, arguments)])
    export_student.main()


def exported(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_name_content_and_report(saved, tmp_path, monkeypatch, capsys):
    model, path = saved
    run(monkeypatch, path, tmp_path / "out" / "student.pth")
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
    run(monkeypatch, path, tmp_path / "out" / "student.pth")
    assert exported(tmp_path / "out").read_bytes() == before  # the same weights, the same name

    run(monkeypatch, written, tmp_path / "again" / "student.pth")
    assert exported(tmp_path / "again").name == written.name
    assert capsys.readouterr().out.endswith("Left out: nothing\n")


@pytest.mark.parametrize("half", [False, True])
def test_loads_as_the_plain_student(saved, tmp_path, monkeypatch, half):
    model, path = saved
    run(monkeypatch, path, tmp_path / "out" / "student.pth", *["--half"] * half)
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
    assisted = build_model(distiller_cfg(case, teacher, [method], **options))
    assert count_parameters(assisted) > 1.02 * count_parameters(assisted.student)
    optimizer = torch.optim.SGD(assisted.parameters(), lr=1e-3)
    with EventStorage():
        sum(assisted(batch()).values()).backward()
    optimizer.step()
    build_checkpointer(assisted, str(tmp_path)).save("model_final")
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["distill"]
    run(monkeypatch, tmp_path / "model_final.pth", tmp_path / "out" / "student.pth")
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
    found = export_student.to_half({"norm.num_batches_tracked": counter, "weight": weight})
    assert found["norm.num_batches_tracked"] is counter and found["weight"].dtype == torch.half


def test_values_beyond_half_precision_are_refused(tmp_path, monkeypatch):
    torch.save({"model": {"norm.running_var": torch.tensor([1.0, 7e4])}}, tmp_path / "model.pth")
    with pytest.raises(SystemExit, match="error: --half: norm.running_var has values up to 7e.04, beyond"):
        run(monkeypatch, tmp_path / "model.pth", tmp_path / "out" / "student.pth", "--half")
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
        run(monkeypatch, path, tmp_path / "out" / "student.pth")
    assert not (tmp_path / "out").exists()


def test_missing_file_and_wrong_ending(saved, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: The checkpoint: there is no file .*none.pth"):
        run(monkeypatch, tmp_path / "none.pth", tmp_path / "student.pth")
    with pytest.raises(SystemExit, match="error: .*student.pkl must end with .pth"):
        run(monkeypatch, saved[1], tmp_path / "student.pkl")


def test_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    """A folder has taken the name."""
    run(monkeypatch, saved[1], tmp_path / "first" / "student.pth")
    taken = tmp_path / "second" / exported(tmp_path / "first").name
    taken.mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: .*student-"):
        run(monkeypatch, saved[1], tmp_path / "second" / "student.pth")
    assert exported(tmp_path / "second") == taken
