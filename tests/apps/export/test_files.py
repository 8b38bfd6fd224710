"""Exported files of every detector: they compute what the detector does, on images of other sizes, found or not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_distill.apps.export.description import describe_model
from d2_distill.apps.export.graphs import RawOutputs, build_graph
from d2_distill.apps.export.runtime import load_exported
from d2_distill.apps.export.tracing import quiet
from d2_distill.apps.export.verification import compare_outputs, match
from d2_distill.apps.export.writers import write_onnx, write_torchscript
from d2_distill.apps.inference.predictor import Predictor
from d2_distill.errors import UserError

from ...end_to_end.runs import ROOT, run_program
from ...low_resolution_pairs import of_student
from ...same_detections import assert_same_detections
from ...small_detectors import CASES, NUM_CLASSES, build, detector_cfg

SIZES = ((90, 100), (64, 150), (33, 40))
CONFIGS = {
    **{case: (case, {}) for case in CASES},
    "OpenMMLabFCOS, AdelaiDet's inference": ("OpenMMLabFCOS", {"FCOS__INFERENCE": "adelaidet"}),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def images(number: int = 1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (number, 3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]


def export(cfg, model, folder: Path, suffix: str, *, raw: bool):
    """The graph, its file and its path."""
    graph = build_graph(model, cfg.TEST.NMS, raw=raw)
    description = describe_model(cfg, model, graph.output_names, raw=raw, fixed_size=None)
    path = folder / f"model{suffix}"
    write = write_torchscript if suffix == ".pt" else write_onnx
    write(graph, images()[0], description, path)
    return graph, load_exported(path), path


def built(case: str):
    base, options = CONFIGS[case]
    cfg = detector_cfg(base, **options)
    return cfg, build(cfg, salt=5).eval()


def assert_accepted(graph, exported, number: int = 1) -> None:
    comparisons = compare_outputs(graph, exported, images(number))
    assert all(c.number > 20 and c.accepted for c in comparisons), comparisons


def as_instances(boxes, scores, classes) -> Instances:
    return Instances((1, 1), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


@pytest.mark.parametrize("case", CONFIGS)
def test_torchscript_is_the_detector(case, tmp_path):
    cfg, model = built(case)
    graph, exported, path = export(cfg, model, tmp_path, ".pt", raw=False)
    for x in images():
        [output] = model([{"image": x[0]}])
        expected = output["instances"]
        assert_same_detections(as_instances(*exported(x)), expected)
    assert str(ROOT).encode() not in path.read_bytes()


def test_the_trace_leaves_nothing_behind():
    """The functions that the tracer had exchanged are back."""
    for name, module in sys.modules.items():
        if name.partition(".")[0] in ("detectron2", "d2_distill"):
            assert not {"len", "min"} & set(vars(module))


@pytest.mark.parametrize("case", ["RetinaNet BN", "OpenMMLabFCOS", "GFLv2"])
def test_raw_torchscript_takes_batches(case, tmp_path):
    cfg, model = built(case)
    graph, exported, _ = export(cfg, model, tmp_path, ".pt", raw=True)
    for x in images(2):
        for ours, theirs in zip(exported(x), graph(x)):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["ATSS", "OpenMMLabFCOS distributions", "GFLv2", "RetinaNet"])
def test_raw_outputs_are_the_heads(case):
    """The scores without centerness, and the boxes, that detections are made from."""
    cfg, model = built(case)
    graph = RawOutputs(model)
    outputs = dict(zip(graph.output_names, graph(images(2)[0])))
    assert set(outputs) - {"centerness"} == {"logits", "deltas", "scores", "boxes"}
    assert outputs["scores"].shape[-1] == NUM_CLASSES and outputs["boxes"].shape[-1] == 4
    [found] = model([{"image": images(2)[0][1]}])
    boxes, image = outputs["boxes"][1], torch.tensor([100.0, 90.0, 100.0, 90.0])
    detected = found["instances"].pred_boxes.tensor
    distances = (detected[:, None] - boxes.clamp(min=0).minimum(image)).abs().amax(dim=-1)
    assert len(detected) > 3 and distances.amin(dim=1).max() < 1e-3


@pytest.fixture
def onnx():
    pytest.importorskip("onnx", reason="ONNX files are written with onnx")
    pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime")


@pytest.mark.parametrize("case", ["RetinaNet", "OpenMMLabFCOS", "GFLv2", "TOOD", "GeneralizedRCNN"])
def test_onnx_is_the_detector(case, tmp_path, onnx):
    cfg, model = built(case)
    graph, exported, path = export(cfg, model, tmp_path, ".onnx", raw=False)
    assert_accepted(graph, exported)
    assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.parametrize("case", ["RetinaNet BN", "OpenMMLabRetinaNet", "ATSS distributions", "MultiScaleDetector"])
def test_raw_onnx_is_the_head(case, tmp_path, onnx):
    cfg, model = built(case)
    graph, exported, _ = export(cfg, model, tmp_path, ".onnx", raw=True)
    assert exported.description["outputs"] == list(graph.output_names)
    assert_accepted(graph, exported, number=2)


def in_widest_gap(scores: torch.Tensor, above: float) -> float:
    """A threshold that scores over ``above`` are far from, so that their rounding does not matter."""
    candidates = torch.cat([torch.tensor([above]), scores[scores > above].sort().values])
    gaps = candidates.diff()
    assert gaps.max() > 1e-4
    return float(candidates[gaps.argmax()] + gaps.max() / 2)


def test_nothing_found(tmp_path, onnx):
    """Not in all levels, and not in all images, is something."""
    cfg, model = built("OpenMMLabRetinaNet")
    *others, best = sorted((model([{"image": x[0]}])[0]["instances"].scores for x in images()), key=max)
    model.test_score_thresh = in_widest_gap(best, above=max(float(scores.max()) for scores in others))
    for suffix in (".pt", ".onnx"):
        _, exported, _ = export(cfg, model, tmp_path, suffix, raw=False)
        numbers = [len(exported(x)[1]) for x in images()]
        assert numbers == [len(model([{"image": x[0]}])[0]["instances"]) for x in images()]
        assert 0 in numbers and max(numbers) > 0


def test_low_resolution(tmp_path):
    cfg = detector_cfg("OpenMMLabFCOS", **of_student())
    graph, exported, _ = export(cfg, build(cfg, salt=5), tmp_path, ".pt", raw=False)
    assert exported.description["size_divisibility"] > 32
    assert_accepted(graph, exported)


def test_the_same_bytes_each_time(tmp_path, onnx):
    cfg, model = built("GFL")
    first, second = (export(cfg, model, tmp_path, ".onnx", raw=True)[2].read_bytes() for _ in range(2))
    assert first == second


def test_what_differs_is_not_accepted(tmp_path):
    cfg, model = built("GFL")
    graph, exported, _ = export(cfg, model, tmp_path, ".pt", raw=False)
    model.head.bbox_pred.bias[0] += 3
    boxes, scores = compare_outputs(graph, exported, images())
    assert not boxes.accepted and not scores.accepted and re_matches(boxes.remark) < 0.9


def re_matches(remark: str) -> float:
    matched, _, number, _ = remark.split()
    return int(matched) / int(number)


def test_matching_is_one_to_one():
    boxes, classes = torch.tensor([[0.0, 0, 9, 9]] * 2), torch.tensor([1, 1])
    one = {"boxes": boxes, "scores": torch.tensor([0.9, 0.9]), "classes": classes}
    other = {"boxes": one["boxes"][:1] + 0.05, "scores": one["scores"][:1], "classes": one["classes"][:1]}
    assert [x.tolist() for x in match(one, other)] == [[0], [0]]
    other["classes"] = torch.tensor([0])
    assert [x.tolist() for x in match(one, other)] == [[], []]


@pytest.mark.parametrize("case", ["GeneralizedRCNN", "GeneralizedRCNN cascade"])
def test_two_stages_have_no_raw_outputs(case):
    cfg, model = built(case)
    with pytest.raises(UserError, match="GeneralizedRCNN has no raw outputs: .* without --raw"):
        build_graph(model, cfg.TEST.NMS, raw=True)


def test_files_of_others_are_refused(tmp_path, onnx):
    with quiet():
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.ones(1)), str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="other.pt does not describe itself as"):
        load_exported(tmp_path / "other.pt")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="bad.onnx cannot be loaded"):
        load_exported(tmp_path / "bad.onnx")


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_example_finds_the_same(suffix, tmp_path, onnx):
    """A program of its own, without this project, and for ONNX files without torch."""
    cfg, model = built("GFL")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATASETS.CLASSES = ("cat", "dog", "bird")
    _, _, path = export(cfg, model, tmp_path, suffix, raw=False)
    pixels = np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    absent = ["d2_distill", "detectron2", *(["torch", "torchvision"] if suffix == ".onnx" else [])]
    script = str(ROOT / "examples" / "run_exported.py")
    arguments = [script, str(path), "photo.png", "--min-score", "0", "--output", "drawn"]
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = {arguments}; "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    outcome = run_program("-c", program, cwd=tmp_path).succeeded()

    resize = detection_utils.build_augmentation(cfg, is_train=False)
    expected = Predictor(model, resize=resize, input_format="BGR")(pixels)
    lines = [line.partition("photo.png: ")[2].split() for line in outcome.stdout.splitlines()]
    boxes = torch.tensor([[float(value) for value in line[3:]] for line in lines])
    classes = torch.tensor([cfg.DATASETS.CLASSES.index(line[0]) for line in lines])
    expected.scores *= 0  # the printed ones have two digits
    assert len(lines) > 3
    assert_same_detections(as_instances(boxes, torch.zeros(len(lines)), classes), expected, corner_tolerance=0.06)
    assert Image.open(tmp_path / "drawn" / "photo.png").size == (56, 40)

    for wrong, named in (
        ([str(path), "absent.png"], "absent"),
        (["absent" + suffix, "photo.png"], "absent"),
        ([str(path), "photo.png", "--output", "photo.png"], "--output: photo.png"),
    ):
        outcome = run_program(script, *wrong, cwd=tmp_path)
        assert outcome.code == 1 and outcome.stderr.startswith(f"error: {named}") and "Traceback" not in outcome.stderr


FROM_P3 = {"RESNETS__OUT_FEATURES": ["res3", "res4", "res5"], "FPN__IN_FEATURES": ["res3", "res4", "res5"]}


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_network_of_timm(suffix, tmp_path, onnx):
    pytest.importorskip("timm", reason="timm is an extra of setup.py")
    cfg = detector_cfg("GFL", **FROM_P3, BACKBONE__NAME="build_timm_fpn_backbone", TIMM__NAME="mobilenetv3_small_050")
    graph, exported, _ = export(cfg, build(cfg).eval(), tmp_path, suffix, raw=True)
    assert_accepted(graph, exported)


def test_deformable_convolutions(tmp_path, onnx):
    """TorchScript has them, with offsets that are not zeros; ONNX as torch writes it has not."""
    cfg = detector_cfg(
        "GFL", **FROM_P3, BACKBONE__NAME="build_p3p7_resnet_fpn_backbone", RESNETS__DEPTH=50,
        RESNETS__WIDTH_PER_GROUP=4, RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, True],
        RESNETS__DEFORM_MODULATED=True,
    )
    model = build(cfg).eval()
    for name, parameter in model.named_parameters():
        if "conv2_offset" in name:
            parameter.data.normal_(std=0.1)
    graph, exported, _ = export(cfg, model, tmp_path, ".pt", raw=True)
    assert_accepted(graph, exported)
    with pytest.raises(UserError, match="cannot write GFL as ONNX .*deformable convolutions.*; export torchscript, or"):
        export(cfg, model, tmp_path, ".onnx", raw=True)
