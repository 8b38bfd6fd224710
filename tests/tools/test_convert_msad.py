"""tools/convert_msad.py on checkpoints with the names of the published code, of small networks."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert_msad  # noqa: E402

from d2_distill.checkpoint.exact import load_exactly  # noqa: E402
from d2_distill.config.reading import read_config  # noqa: E402
from d2_distill.detectors.building import build_detector  # noqa: E402
from d2_distill.errors import UserError  # noqa: E402

from ..small_detectors import batch  # noqa: E402

WIDTHS = (0.0625, 0.125)
CHANNELS, CLASSES, CONVS = 32, 3, 1
BOTTOM_UP = "T_backbone.bottom_up"
OPTS = [
    "MODEL.DEVICE", "cpu",
    "MODEL.SLIMMABLE.WIDTH_MULT_LIST", str(list(WIDTHS)),
    "MODEL.SLIMMABLE.WIDTH_MULT", str(WIDTHS[0]),
    "MODEL.FPN.OUT_CHANNELS", str(CHANNELS),
    "MODEL.FCOS.NUM_CLASSES", str(CLASSES),
    "MODEL.FCOS.NUM_CONVS", str(CONVS),
]  # fmt: skip
CONFIGS = {
    role: str(ROOT / f"configs/msad/reference/fcos_SLR25_FPN_1x_ms_{role}.yaml")
    for role in ("teacher", "student")
}


def _norms(prefix: str, channels: int) -> dict[str, tuple]:
    """Batch norms of both widths; ``channels`` are the wider one's."""
    shapes = {}
    for index, width in enumerate(WIDTHS):
        size = (int(channels * width / WIDTHS[-1]),)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.bn.{index}.{leaf}"] = size
        shapes[f"{prefix}.bn.{index}.num_batches_tracked"] = ()
    return shapes


def _resnet() -> dict[str, tuple]:
    """Shapes of the slimmable ResNet-50."""
    stem = int(64 * WIDTHS[-1])
    shapes = {"features.0.0.weight": (stem, 3, 7, 7), **_norms("features.0.1", stem)}
    in_channels, index = stem, 1
    for stage, blocks in enumerate((3, 4, 6, 3)):
        out_channels = int(64 * 2**stage * 4 * WIDTHS[-1])
        middle = out_channels // 4
        for block in range(blocks):
            sizes = ((middle, in_channels, 1, 1), (middle, middle, 3, 3), (out_channels, middle, 1, 1))
            for number, size in enumerate(sizes):
                shapes[f"features.{index}.body.{3 * number}.weight"] = size
                shapes.update(_norms(f"features.{index}.body.{3 * number + 1}", size[0]))
            if block == 0:
                shapes[f"features.{index}.shortcut.0.weight"] = (out_channels, in_channels, 1, 1)
                shapes.update(_norms(f"features.{index}.shortcut.1", out_channels))
            in_channels, index = out_channels, index + 1
    return shapes


def _detector(letter: str) -> dict[str, tuple]:
    shapes = {f"{letter}_backbone.bottom_up.{name}": shape for name, shape in _resnet().items()}

    def conv(name: str, out_channels: int, in_channels: int, kernel: int, bias: bool = True) -> None:
        shapes[f"{letter}_{name}.weight"] = (out_channels, in_channels, kernel, kernel)
        if bias:
            shapes[f"{letter}_{name}.bias"] = (out_channels,)

    for stage in range(4):
        conv(f"backbone.fpn_lateral{stage + 2}", CHANNELS, int(256 * 2**stage * WIDTHS[0]), 1)
        conv(f"backbone.fpn_output{stage + 2}", CHANNELS, CHANNELS, 3)
    conv("backbone.top_block.p6", CHANNELS, int(2048 * WIDTHS[0]), 3)
    conv("backbone.top_block.p7", CHANNELS, CHANNELS, 3)
    for tower in ("cls", "bbox"):
        for block in range(CONVS):
            conv(f"fcos_head.{tower}_tower.{3 * block}", CHANNELS, CHANNELS, 3)
            for leaf in ("weight", "bias"):
                shapes[f"{letter}_fcos_head.{tower}_tower.{3 * block + 1}.{leaf}"] = (CHANNELS,)
    conv("fcos_head.cls_logits", CLASSES, CHANNELS, 3)
    conv("fcos_head.bbox_pred", 4, CHANNELS, 3, bias=False)
    conv("fcos_head.ctrness", 1, CHANNELS, 3, bias=False)
    shapes.update({f"{letter}_fcos_head.scales.{level}.scale": (1,) for level in range(5)})
    return shapes


def _published(role: str) -> dict[str, torch.Tensor]:
    shapes = _detector("T")
    shapes.update({"SE.fc.0.weight": (4, 2 * CHANNELS), "SE.fc.2.weight": (2, 4)})
    if role == "student":
        shapes.update(_detector("S"))
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) if shape or "scale" in name else torch.tensor(7)
        for name, shape in shapes.items()
    }


def _save(path: Path, state: dict[str, torch.Tensor]) -> str:
    """As Detectron2's checkpointer, with the counters of its schedulers."""
    torch.save({"model": state, "iteration": 9, "scheduler": {"milestones": Counter({60000: 1})}}, path)
    return str(path)


def _run(tmp_path: Path, state, role: str, *opts: str, name: str = "ours.pth") -> Path:
    output = tmp_path / name
    words = [_save(tmp_path / "theirs.pth", state), str(output), "--config-file", CONFIGS[role], *OPTS, *opts]
    convert_msad.run(convert_msad.parser().parse_intermixed_args(words))
    return output


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("index", [0, 1])
def test_every_tensor_finds_its_place(tmp_path, role, index):
    state = _published(role)
    width = WIDTHS[index]
    if index:  # FPN's lateral convolutions belong to the width
        for name in [name for name in state if "fpn_lateral" in name or "top_block.p6" in name]:
            if state[name].dim() == 4:
                state[name] = state[name].repeat_interleave(2, dim=1)
    output = _run(tmp_path, state, role, "MODEL.SLIMMABLE.WIDTH_MULT", str(width))
    found = torch.load(output, weights_only=True)["model"]
    model = build_detector(read_config(CONFIGS[role], [*OPTS, "MODEL.SLIMMABLE.WIDTH_MULT", str(width)], source="the test"))
    load_exactly(model, str(output), key="the test")
    letter, pyramid, inner = {
        "teacher": ("T", "detector.backbone", "detector."),
        "student": ("S", "backbone.pyramid", ""),
    }[role]
    middle, out = int(64 * width), int(256 * width)
    ours, theirs = f"{pyramid}.bottom_up", "backbone.bottom_up.features"
    expected = {
        f"{ours}.stem.conv1.weight": (f"{theirs}.0.0.weight", (middle, 3)),
        f"{ours}.stem.conv1.norm.running_var": (f"{theirs}.0.1.bn.{index}.running_var", (middle,)),
        f"{ours}.res2.0.shortcut.weight": (f"{theirs}.1.shortcut.0.weight", (out, middle)),
        f"{ours}.res3.1.conv3.weight": (f"{theirs}.5.body.6.weight", (2 * out, 2 * middle)),
        f"{ours}.res3.1.conv3.norm.bias": (f"{theirs}.5.body.7.bn.{index}.bias", (2 * out,)),
        f"{ours}.res5.2.conv2.weight": (f"{theirs}.16.body.3.weight", (8 * middle, 8 * middle)),
        f"{pyramid}.fpn_lateral4.bias": ("backbone.fpn_lateral4.bias", (CHANNELS,)),
        f"{pyramid}.top_block.p6.weight": ("backbone.top_block.p6.weight", (CHANNELS,)),
        f"{inner}head.cls_subnet.0.weight": ("fcos_head.cls_tower.0.weight", (CHANNELS,)),
        f"{inner}head.bbox_subnet.1.bias": ("fcos_head.bbox_tower.1.bias", (CHANNELS,)),
        f"{inner}head.cls_score.bias": ("fcos_head.cls_logits.bias", (CLASSES,)),
        f"{inner}head.ctrness.weight": ("fcos_head.ctrness.weight", (1,)),
    }
    for name, (published, sizes) in expected.items():
        value = state[f"{letter}_{published}"][tuple(slice(size) for size in sizes)]
        assert torch.equal(found[name], value), name
    assert found[f"{inner}head.scales.3.scale"] == state[f"{letter}_fcos_head.scales.3.scale"].item()
    if role == "teacher":
        assert torch.equal(found["fusion.fc.2.weight"], state["SE.fc.2.weight"])
    assert ("detector.backbone.top_block.p7.weight" in found) == (role == "teacher")
    with torch.no_grad():
        assert len(model.eval()(batch())) == 2


def test_a_checkpoint_of_the_other_role(tmp_path):
    message = "theirs.pth is of a student, but the config is not; .*low_resolution_backbone"
    with pytest.raises(UserError, match=message):
        _run(tmp_path, _published("student"), "teacher")
    message = "theirs.pth is of a teacher, but the config is not; .*MultiScaleDetector"
    with pytest.raises(UserError, match=message):
        _run(tmp_path, _published("teacher"), "student")


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{BOTTOM_UP}.features.17.body.0.weight": torch.zeros(3)}, "only 318 of the 319 tensors"),
        ({"optimizer.weight": torch.zeros(3)}, r"has 1 tensors that no model .* has \(optimizer.weight\)"),
        ({"T_fcos_head.share_tower.0.bias": torch.zeros(3)}, "unexpected: detector.head.share_tower.0.bias"),
        ({"SE.fc.0.weight": None}, "1 missing: fusion.fc.0.weight"),
        ({"T_fcos_head.cls_logits.bias": torch.zeros(80)}, r"mis-shaped: .*head.cls_score.bias \(80,\)"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, change, message):
    state = {**_published("teacher"), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError, match=message):
        _run(tmp_path, state, "teacher")
    assert not (tmp_path / "ours.pth").exists()


def test_as_a_command(tmp_path, monkeypatch, capsys):
    source = _save(tmp_path / "theirs.pth", _published("teacher"))

    def main(output: str) -> None:
        words = [source, str(tmp_path / output), "--config-file", CONFIGS["teacher"], *OPTS]
        monkeypatch.setattr(sys, "argv", ["convert_msad.py", *words])
        convert_msad.main()

    main("ours.pth")
    assert "Left out 265 tensors that the model does without" in capsys.readouterr().err
    torch.save([1], source)
    wrong = {"b.pth": "theirs.pth holds no state dict of a detector", "b.pt": "must end with .pth"}
    for output, message in wrong.items():
        with pytest.raises(SystemExit, match=message):
            main(output)
