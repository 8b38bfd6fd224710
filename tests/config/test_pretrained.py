"""Keys that torchvision's weights need: defaults are corrected, other values refused; detectors trained from them."""

from __future__ import annotations

import logging

import pytest
import torchvision

from d2_distill.checkpoint.torchvision import PIXEL_MEAN, PIXEL_STD
from d2_distill.checkpoint.torchvision.layouts import RULES
from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.pretrained import corrections, require_corrected, with_pretrained_inputs
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError
from d2_distill.teacher import read_teacher_config

RESNET18, RESNET50 = "torchvision://resnet18", "torchvision://resnet50"
RGB = {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
BGR = {key: value[::-1] for key, value in RGB.items()}


def config(weights=RESNET18, **overrides):
    """Keywords are keys with ``__`` for the dots."""
    cfg = get_distill_cfg()
    values = {"MODEL.WEIGHTS": weights, **{key.replace("__", "."): value for key, value in overrides.items()}}
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    return cfg


def statistics(cfg):
    return {"MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN), "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD)}


@pytest.mark.parametrize("name", RULES)
def test_all_models_were_trained_with_these_statistics(name):
    for weights in torchvision.models.get_model_weights(name):
        preset = weights.transforms()
        assert [255 * value for value in preset.mean] == pytest.approx(PIXEL_MEAN)
        assert [255 * value for value in preset.std] == pytest.approx(PIXEL_STD)


@pytest.mark.parametrize("image_format, expected", [("RGB", RGB), ("BGR", BGR)])
@pytest.mark.parametrize("given", [{}, RGB, BGR, {"MODEL.PIXEL_STD": RGB["MODEL.PIXEL_STD"]}])
def test_defaults_and_the_other_order_are_corrected(image_format, expected, given):
    """Whatever the order of the config's values, the format is the user's."""
    cfg = config(INPUT__FORMAT=image_format, **given)
    before = cfg.dump()
    corrected = with_pretrained_inputs(cfg)
    assert statistics(corrected) == expected and corrected.INPUT.FORMAT == image_format
    assert cfg.dump() == before
    assert not corrections(corrected, RESNET18)


def test_what_is_right_stays(caplog):
    cfg = config(**BGR)
    with caplog.at_level(logging.INFO):
        assert with_pretrained_inputs(cfg) is cfg
    assert not caplog.messages


def test_other_weights_change_nothing():
    for weights in ("", "resnet18.pkl", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"):
        cfg = config(weights, MODEL__PIXEL_MEAN=[1.0, 2.0, 3.0], INPUT__FORMAT="L")
        assert with_pretrained_inputs(cfg) is cfg


def test_log_names_old_and_new_values(caplog):
    with caplog.at_level(logging.INFO):
        with_pretrained_inputs(config(RESNET50))
    assert caplog.messages == [
        "torchvision://resnet50: MODEL.PIXEL_STD is [57.375, 57.12, 58.395] (it was [1.0, 1.0, 1.0]), "
        "MODEL.RESNETS.STRIDE_IN_1X1 is False (it was True), as the weights were trained."
    ]


def test_frozen_configs_stay_frozen():
    cfg = config()
    cfg.freeze()
    assert with_pretrained_inputs(cfg).is_frozen()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"MODEL__PIXEL_MEAN": [128.0, 128.0, 128.0]},
         r"^MODEL.PIXEL_MEAN is \[128.0, .*with \[103.53, 116.28, 123.675\] in the order of INPUT.FORMAT BGR; set it"),
        ({"MODEL__PIXEL_STD": [255.0, 255.0, 255.0], "INPUT__FORMAT": "RGB"},
         r"^MODEL.PIXEL_STD is \[255.0, .*with \[58.395, 57.12, 57.375\] in the order of INPUT.FORMAT RGB; set it"),
        ({"MODEL__PIXEL_MEAN": [128.0], "MODEL__PIXEL_STD": [1.0]}, "^MODEL.PIXEL_MEAN is "),
        ({"INPUT__FORMAT": "L"}, "^INPUT.FORMAT is 'L', but torchvision://resnet18 was trained with colors; set it"),
        ({"MODEL__WEIGHTS": "torchvision://mobilenet_v2", "MODEL__MOBILENETV2__SAME_PADDING": True},
         "^MODEL.MOBILENETV2.SAME_PADDING is True, .*set it to False"),
        ({"MODEL__WEIGHTS": "torchvision://resnet19"}, "^MODEL.WEIGHTS: .* no model 'resnet19'; did you mean"),
    ],
)
def test_other_values_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        with_pretrained_inputs(config(**overrides))


def test_a_config_that_nobody_corrected():
    message = r"^MODEL.WEIGHTS: torchvision://resnet18 needs MODEL.PIXEL_STD \[57.375.*load_config"
    with pytest.raises(UserError, match=message):
        require_corrected(config())
    require_corrected(with_pretrained_inputs(config()))


@pytest.fixture
def config_file(tmp_path):
    """What the training of a detector was started with."""
    path = tmp_path / "student.yaml"
    path.write_text(f"MODEL: {{WEIGHTS: '{RESNET50}', META_ARCHITECTURE: RetinaNet, DEVICE: cpu}}\nVERSION: 2\n")
    return str(path)


def test_the_detector_that_was_trained(config_file):
    """Its checkpoint goes with the keys of its training, whichever config it is named with."""
    opts = ["MODEL.WEIGHTS", "model_final.pth"]
    cfg = load_config(config_file, opts)
    assert statistics(cfg) == BGR and not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.WEIGHTS == "model_final.pth"
    # Of one that was trained from other weights.
    other = ["MODEL.PIXEL_MEAN", "[128.0, 128.0, 128.0]", "MODEL.PIXEL_STD", "[128.0, 128.0, 128.0]"]
    cfg = load_config(config_file, [*opts, *other])
    assert statistics(cfg)["MODEL.PIXEL_STD"] == [128.0, 128.0, 128.0]
    # A training from other weights.
    cfg = load_config(config_file, opts, trained=False)
    assert statistics(cfg)["MODEL.PIXEL_STD"] == [1.0, 1.0, 1.0] and cfg.MODEL.RESNETS.STRIDE_IN_1X1


@pytest.mark.parametrize("named_in", ["WEIGHTS", "OPTS"])
def test_a_teacher_that_was_trained(config_file, named_in):
    cfg = config("")
    teacher = cfg.MODEL.DISTILL.TEACHER
    teacher.CONFIG_FILE = config_file
    if named_in == "WEIGHTS":
        teacher.WEIGHTS = "model_final.pth"
    else:
        teacher.OPTS = ["MODEL.WEIGHTS", "model_final.pth"]
    cfg = read_teacher_config(cfg)
    assert statistics(cfg) == BGR and not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.WEIGHTS == "model_final.pth"
