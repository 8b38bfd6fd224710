"""Runs that start from torchvision's weights, on a machine that has their file and on one that cannot download it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from ..pretrained import put_weights, torchvision_model
from .runs import QUIET, TINY, checkpoint, distiller, merged, write_config

ADDRESS = "torchvision://mobilenet_v2"
# Nothing but the two keys that it takes; the pixel statistics are Detectron2's defaults.
MOBILENET = {
    "MODEL": {
        "WEIGHTS": ADDRESS,
        "BACKBONE": {"NAME": "build_mobilenet_v2_fpn_backbone", "FREEZE_AT": 2},
        "FPN": {"TOP_BLOCK": ""},
    },
    "SOLVER": {"MAX_ITER": 2, "CHECKPOINT_PERIOD": 1},
}
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
STEM = "backbone.bottom_up.features.0.0.weight"


@dataclass
class Pretrained:
    """A run of two iterations; ``stem`` is torchvision's first convolution, for BGR."""

    torch_home: Path
    config: Path
    folder: Path
    stem: torch.Tensor

    @property
    def environment(self) -> dict[str, str]:
        return {"TORCH_HOME": str(self.torch_home), **OFFLINE}


@pytest.fixture(scope="module")
def pretrained(server, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    model = torchvision_model("mobilenet_v2")
    put_weights(folder / "torch", model, "mobilenet_v2")
    config = write_config(folder / "config.yaml", TINY, data, QUIET, MOBILENET)
    run = Pretrained(folder / "torch", config, folder / "run", model.features[0][0].weight.detach().flip(1))
    server.run("--config-file", config, "OUTPUT_DIR", run.folder, **run.environment).succeeded()
    return run


def test_weights_and_pixels_of_a_run(pretrained):
    assert torch.equal(checkpoint(pretrained.folder / "model_final.pth")["model"][STEM], pretrained.stem)
    keys = yaml.safe_load((pretrained.folder / "config.yaml").read_text())
    assert keys["MODEL"]["WEIGHTS"] == ADDRESS and keys["INPUT"]["FORMAT"] == "BGR"
    assert keys["MODEL"]["PIXEL_MEAN"] == [103.53, 116.28, 123.675]
    assert keys["MODEL"]["PIXEL_STD"] == [57.375, 57.12, 58.395]
    log = (pretrained.folder / "log.txt").read_text()
    assert log.count(f"{ADDRESS}: MODEL.PIXEL_STD is [57.375, 57.12, 58.395] (it was [1.0, 1.0, 1.0])") == 1
    assert log.count("ImageNet weights of torchvision's mobilenet_v2") == 1
    assert "260 tensors of the backbone, for images in the order BGR; FPN and head start fresh." in log


@pytest.mark.parametrize("own_config", [False, True])
def test_resuming_needs_no_file(server, pretrained, tmp_path, own_config):
    """With the config that the run was started with, or its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.json", "model_0000000.pth"):
        (folder / name).write_bytes((pretrained.folder / name).read_bytes())
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    config = folder / "config.yaml" if own_config else pretrained.config
    environment = {**pretrained.environment, "TORCH_HOME": str(tmp_path)}
    server.run("--config-file", config, "--resume", "OUTPUT_DIR", folder, **environment).succeeded()
    found, expected = (checkpoint(path / "model_final.pth")["model"] for path in (folder, pretrained.folder))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_evaluation_by_either_config(server, data, pretrained, tmp_path):
    test_set = ("DATASETS.TEST", f"('{data['DATASETS']['TEST'][0]}',)")
    weights = ("MODEL.WEIGHTS", pretrained.folder / "model_final.pth")
    detections = []
    for config in (pretrained.config, pretrained.folder / "config.yaml"):
        folder = tmp_path / str(len(detections))
        opts = ("--eval-only", "OUTPUT_DIR", folder, *test_set, *weights)
        server.run("--config-file", config, *opts).succeeded()
        detections.append(next(folder.rglob("coco_instances_results.json")).read_text())
    assert detections[0] == detections[1] != "[]"


@pytest.mark.parametrize("own_config", [False, True])
def test_student_and_teacher(server, data, pretrained, tmp_path, own_config):
    """Both are normalized alike, whichever config names the teacher."""
    teacher = pretrained.folder / "config.yaml" if own_config else pretrained.config
    distilled = distiller(teacher, pretrained.folder / "model_final.pth", "PKD")
    config = write_config(tmp_path / "config.yaml", TINY, data, QUIET, MOBILENET, distilled)
    folder = tmp_path / "run"
    server.run("--config-file", config, "OUTPUT_DIR", folder, **pretrained.environment).succeeded()
    assert torch.equal(checkpoint(folder / "model_final.pth")["model"][STEM], pretrained.stem)
    log = (folder / "log.txt").read_text()
    assert "ImageNet weights of torchvision's mobilenet_v2" in log


def test_two_processes(server, data, pretrained, tmp_path):
    arguments = ("--config-file", pretrained.config, "OUTPUT_DIR", tmp_path / "run")
    server.run(*arguments, processes=2, **pretrained.environment).succeeded()
    assert torch.equal(checkpoint(tmp_path / "run" / "model_final.pth")["model"][STEM], pretrained.stem)


@pytest.mark.parametrize("processes", [1, 2])
def test_no_file_and_no_connection(server, pretrained, tmp_path, processes):
    environment = {**OFFLINE, "TORCH_HOME": str(tmp_path / "torch")}
    arguments = ("--config-file", pretrained.config, "OUTPUT_DIR", tmp_path / "run")
    outcome = server.run(*arguments, processes=processes, **environment)
    assert set(outcome.codes) == {1} and len(outcome.errors) == 1, outcome
    assert "Traceback" not in outcome.stderr and not (tmp_path / "run").exists()
    for part in ("error: MODEL.WEIGHTS: mobilenet_v2-7ebf99e0.pth", "https://download.pytorch.org/models/mobilenet_v2",
                 f"put it into {tmp_path / 'torch' / 'hub' / 'checkpoints'}"):
        assert part in outcome.errors[0]


@pytest.mark.parametrize(
    "opts, says",
    [
        (("MODEL.WEIGHTS", "torchvision://resnet50"), "does not fit the backbone, a MobileNetV2"),
        (("MODEL.WEIGHTS", "torchvision://mobilenetv2"), f"did you mean {ADDRESS}"),
        (("MODEL.PIXEL_STD", "[128.0, 128.0, 128.0]"), "MODEL.PIXEL_STD is [128.0, 128.0, 128.0], but"),
        (("--eval-only",), f"MODEL.WEIGHTS: {ADDRESS} names the weights of a classifier"),
    ],
)
def test_refused(server, pretrained, tmp_path, opts, says):
    options = [option for option in opts if option.startswith("--")]
    keys = [option for option in opts if option not in options]
    outcome = server.run(
        "--config-file", pretrained.config, *options, "OUTPUT_DIR", tmp_path / "run", *keys, **pretrained.environment
    )
    assert outcome.code == 1 and len(outcome.errors) == 1 and says in outcome.errors[0], outcome
    assert "Traceback" not in outcome.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["TEACHER.WEIGHTS", "TEACHER.CONFIG_FILE"])
def test_no_teacher(server, data, pretrained, tmp_path, key):
    """Neither named as such, nor as what its config was trained from."""
    distilled = distiller(pretrained.config, ADDRESS if key == "TEACHER.WEIGHTS" else "", "PKD")
    config = write_config(tmp_path / "config.yaml", merged(TINY, data, QUIET, distilled))
    outcome = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "run", **pretrained.environment)
    assert outcome.code == 1 and len(outcome.errors) == 1, outcome
    assert f"MODEL.DISTILL.TEACHER.WEIGHTS: {ADDRESS} names the weights of a classifier" in outcome.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_file_of_torchvision(server, pretrained, tmp_path):
    """Detected and converted; the pixel statistics stay as they are, since the file does not tell its own."""
    file = tmp_path / "mine.pth"
    file.symlink_to(next(pretrained.torch_home.rglob("*.pth")))
    opts = ("MODEL.WEIGHTS", file, "INPUT.FORMAT", "RGB", "OUTPUT_DIR", tmp_path / "run")
    server.run("--config-file", pretrained.config, *opts, **OFFLINE).succeeded()
    assert torch.equal(checkpoint(tmp_path / "run" / "model_final.pth")["model"][STEM], pretrained.stem.flip(1))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["MODEL"]["PIXEL_STD"] == [1.0, 1.0, 1.0]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "tensors of a classifier in torchvision's names fill the backbone" in log
