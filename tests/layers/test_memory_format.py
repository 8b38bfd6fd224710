"""Convolutions on which oneDNN fails in channels_last keep the contiguous format; all others do not."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from d2_distill.layers.memory_format import fails_in_channels_last, in_fast_layout

ROOT = Path(__file__).resolve().parents[2]
# A step of the quick start's student at some widths, on images large enough that the fault shows.
STEP = """
import d2_distill, sys, torch
from detectron2.utils.events import EventStorage
from d2_distill.detectors.building import build_detector
from d2_distill.engine.setup import load_config
from d2_distill.engine.trainer import Trainer
from d2_distill.evaluation.speed import synthetic_batch

def gradients(model):
    model.zero_grad()
    with EventStorage():
        sum(model(synthetic_batch(2, 256, 256, num_classes=10)).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "shortcut.weight" in name}

for width in (4, 8):
    cfg = load_config("configs/quickstart/student.yaml", [
        "MODEL.RESNETS.STEM_OUT_CHANNELS", width, "MODEL.RESNETS.RES2_OUT_CHANNELS", width, "OUTPUT_DIR", sys.argv[1],
        "DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"])
    model = Trainer(cfg, build_detector(cfg)).model
    found = [gradients(model) for _ in range(3)][-1]
    with torch.backends.mkldnn.flags(enabled=False):
        expected = gradients(model)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 0.1, (width, name, error)
    print(width, len(expected))
"""


def conv(channels: int, kernel_size: int = 1, stride: int = 2, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, 32, kernel_size, stride=stride, **options)


@pytest.mark.parametrize(
    "module, fails",
    [
        (conv(8), True), (conv(15), True), (conv(3), True), (conv(16), False), (conv(64), False),
        (conv(8, stride=(1, 2)), True), (conv(8, stride=1), False), (conv(8, kernel_size=3, padding=1), False),
        (conv(32, groups=4), True), (conv(32, groups=2), False), (nn.Linear(8, 8), False), (nn.BatchNorm2d(8), False),
    ],
)
def test_strided_pointwise_convolutions_of_few_channels_fail(module, fails):
    assert fails_in_channels_last(module) is fails


@pytest.mark.parametrize("channels, device, fast", [(8, "cpu", False), (16, "cpu", True), (8, "meta", True)])
def test_the_layout_depends_on_channels_and_device(channels, device, fast, caplog):
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Sequential(conv(channels))).to(device)
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        assert in_fast_layout(model) is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) is fast
    message = "1.0 has a stride and only 8 input channels; from 16 on they use channels_last."
    assert [message in record.getMessage() for record in caplog.records] == ([] if fast else [True])


def test_nothing_else_chooses_a_memory_format():
    files = [*ROOT.glob("d2_distill/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "train_net.py"]
    users = [path.name for path in files if "torch.channels_last" in path.read_text()]
    assert users == ["memory_format.py"]


def test_narrow_students_train(tmp_path):
    """In a process of its own: in channels_last, oneDNN's kernels for AVX2 kill or hang it at 4, AVX-512's at 8."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STEP, str(tmp_path)]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0 and outcome.stdout.split() == ["4", "3", "8", "3"], outcome
