"""tools/convert_torchvision_resnet.py: the converted backbone computes what torchvision's does; bad files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

ROOT = Path(__file__).parents[2]


def _run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "convert_torchvision_resnet.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A random torchvision ResNet-18 in eval mode, and its converted file."""
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), folder / "resnet18.pth")
    result = _run(folder / "resnet18.pth", folder / "new" / "R-18.pkl")
    assert result.returncode == 0, result.stderr
    assert "122 tensors" in result.stdout
    return model, folder / "new" / "R-18.pkl"


def test_features_are_those_of_torchvision(resnet):
    model, path = resnet
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18,
                         "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STRIDE_IN_1X1", False,
                         "MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]])
    detector = nn.ModuleDict({"backbone": build_backbone(cfg)})
    DetectionCheckpointer(detector).load(str(path))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        res2 = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(image)))))
        res5 = model.layer4(model.layer3(model.layer2(res2)))
        features = detector["backbone"](image)
    torch.testing.assert_close(features["res2"], res2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["res5"], res5, rtol=1e-4, atol=1e-4)


def test_help_shows_an_example():
    result = _run("--help")
    assert result.returncode == 0
    assert "PIXEL_MEAN" in result.stdout and "convert_torchvision_resnet.py resnet18" in result.stdout


def _bad_files(folder):
    text = folder / "text.pth"
    text.write_text("not a checkpoint")
    other = folder / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    listed = folder / "list.pth"
    torch.save([1, 2], listed)
    code = folder / "code.pth"
    code.write_bytes(pickle.dumps(_bad_files))
    return [
        ([folder / "absent.pth", folder / "out.pkl"], "absent.pth does not exist"),
        ([text, folder / "out.pkl"], "text.pth is not a file of tensors"),
        ([code, folder / "out.pkl"], "code.pth is not a file of tensors"),
        ([other, folder / "out.pkl"], "lacks bn1.running_mean, conv1.weight"),
        ([listed, folder / "out.pkl"], "list.pth does not hold a torchvision ResNet"),
        ([other, folder / "out.pth"], "must end with .pkl"),
        ([other, folder / "taken.pkl"], "exists already"),
    ]


def test_bad_input_is_named_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_torchvision_resnet as tool

    from d2_distill.errors import UserError

    (tmp_path / "taken.pkl").write_text("mine")
    for arguments, message in _bad_files(tmp_path):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(UserError, match=message):
            tool.main()
    assert not list(tmp_path.glob("out.*"))
    assert (tmp_path / "taken.pkl").read_text() == "mine"
    result = _run(tmp_path / "absent.pth", tmp_path / "out.pkl")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "absent.pth" in result.stderr
