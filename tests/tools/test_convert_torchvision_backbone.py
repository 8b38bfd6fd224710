"""tools/convert_torchvision_backbone.py: the converted backbone computes what torchvision's does; bad files."""

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

from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.reading import read_config
from d2_distill.detectors.building import build_detector
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert_torchvision_backbone as tool  # noqa: E402


def _run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "convert_torchvision_backbone.py"), *map(str, arguments)]
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


def _build_backbone(depth, norm="FrozenBN"):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", depth,
                         "MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256,
                         "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.NORM", norm,
                         "MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]])
    return build_backbone(cfg)


@pytest.mark.parametrize("fixed_batch_norm", [False, True])
def test_features_are_those_of_torchvision(resnet, fixed_batch_norm):
    model, path = resnet
    if fixed_batch_norm:
        backbone = FixedBatchNorm2d.convert(_build_backbone(18, norm="BN")).train()
    else:
        backbone = _build_backbone(18)
    detector = nn.ModuleDict({"backbone": backbone})
    DetectionCheckpointer(detector).load(str(path))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        res2 = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(image)))))
        res5 = model.layer4(model.layer3(model.layer2(res2)))
        features = detector["backbone"](image)
    torch.testing.assert_close(features["res2"], res2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["res5"], res5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_every_depth_has_detectron2s_names(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = _build_backbone(depth, norm="BN").state_dict()
    theirs = {name: torch.empty(value.shape) for name, value in theirs.items()}
    converted = {name: value.shape for name, value in tool.convert(theirs)["model"].items() if "fc." not in name}
    assert converted == {name: tuple(value.shape) for name, value in ours.items()}


def _random(model):
    """No two tensors alike."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "architecture, builder",
    [("mobilenet_v2", "build_mobilenet_v2_fpn_backbone"), ("swin_t", "build_swin_fpn_backbone")],
)
def test_every_tensor_arrives(architecture, builder, tmp_path, monkeypatch):
    """In the trunk all and exactly, in the rest of the detector none."""
    torch.manual_seed(0)
    theirs = _random(torchvision.models.get_model(architecture)).state_dict()
    torch.save(theirs, tmp_path / "weights.pth")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "weights.pth"), str(tmp_path / "weights.pkl")])
    tool.main()
    cfg = get_distill_cfg()
    features = ["res3", "res4", "res5"]
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", builder, "MODEL.BACKBONE.FREEZE_AT", 0,
                         "MODEL.FPN.IN_FEATURES", features, "MODEL.FPN.NORM", "GN"])
    detector = nn.ModuleDict({"backbone": build_backbone(cfg)})
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    DetectionCheckpointer(detector).load(str(tmp_path / "weights.pkl"))
    trunk = "backbone.bottom_up.features."
    for name, value in detector.state_dict().items():
        expected = theirs[name[len("backbone.bottom_up."):]] if name.startswith(trunk) else before[name]
        assert torch.equal(value, expected), name
    loaded = {name for name in theirs if trunk + name[len("features."):] in before}
    assert set(theirs) - loaded == {name for name in theirs if name.startswith(("classifier.", "norm.", "head."))}


def test_weights_of_tensorflow_with_their_config(tmp_path, monkeypatch):
    """From a file in torchvision's layout to features of RGB images, with TensorFlow's padding and statistics."""
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "weights.pth"), str(tmp_path / "weights.pkl")])
    tool.main()
    opts = ["MODEL.WEIGHTS", str(tmp_path / "weights.pkl"), "MODEL.DEVICE", "cpu"]
    cfg = read_config(str(ROOT / "configs" / "bccd" / "mnv2_student.yaml"), opts, source="The config")
    assert cfg.INPUT.FORMAT == "RGB"
    student = build_detector(cfg).eval()
    DetectionCheckpointer(student).load(cfg.MODEL.WEIGHTS)

    for block in theirs.features.modules():
        if isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv2d) and block[0].stride == (2, 2):
            block[0].padding = (0, 0)
            block.insert(0, nn.ZeroPad2d((0, 1, 0, 1)))  # left, right, top, bottom
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        ours = student.backbone.bottom_up(student.preprocess_image([{"image": image}]).tensor)
        x = (image.float()[None] - 128) / 128
        for name, layers in (("res3", 7), ("res4", 14), ("res5", 19)):
            expected = theirs.features[:layers](x)
            assert expected.std() > 0
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_older_checkpoints_lack_the_counters():
    model = torchvision.models.resnet18()
    state_dict = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert "res5.1.conv2.norm.running_var" in tool.convert(state_dict)["model"]


def test_help_shows_an_example():
    result = _run("--help")
    assert result.returncode == 0
    assert "PIXEL_MEAN" in result.stdout and "convert_torchvision_backbone.py resnet18" in result.stdout


def _bad_files(folder):
    text = folder / "text.pth"
    text.write_text("not a checkpoint")
    word = folder / "word.pth"
    word.write_text("junk\n")
    other = folder / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    changed = folder / "changed.pth"
    state_dict = torchvision.models.mobilenet_v2().state_dict()
    state_dict["features.17.conv.3.scale"] = state_dict.pop("features.17.conv.3.weight")
    torch.save(state_dict, changed)
    listed = folder / "list.pth"
    torch.save([1, 2], listed)
    code = folder / "code.pth"
    code.write_bytes(pickle.dumps(_bad_files))
    return [
        ([folder / "absent.pth", folder / "out.pkl"], "there is no file .*absent.pth"),
        ([text, folder / "out.pkl"], "text.pth cannot be read as a checkpoint"),
        ([word, folder / "out.pkl"], "word.pth cannot be read as a checkpoint"),
        ([code, folder / "out.pkl"], "code.pth cannot be read as a checkpoint"),
        ([other, folder / "out.pkl"], r"other.pth does not hold .* it lacks .* and has the unknown features.0.weight"),
        ([changed, folder / "out.pkl"],
         "similar, mobilenet_v2, it lacks features.17.conv.3.weight and has the unknown features.17.conv.3.scale"),
        ([listed, folder / "out.pkl"], "list.pth is not a state dict"),
        ([other, folder / "out.pth"], "must end with .pkl"),
        ([other, folder / "taken.pkl"], "exists already"),
    ]


def test_bad_input_is_named_and_nothing_written(tmp_path, monkeypatch):
    (tmp_path / "taken.pkl").write_text("mine")
    for arguments, message in _bad_files(tmp_path):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tool.main()
    assert not list(tmp_path.glob("out.*"))
    assert (tmp_path / "taken.pkl").read_text() == "mine"
    result = _run(tmp_path / "absent.pth", tmp_path / "out.pkl")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "error: The checkpoint" in result.stderr
