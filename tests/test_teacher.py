"""The teacher's config, and that it sees the images as it was trained to."""

from __future__ import annotations

import re

import pytest
import torch
from detectron2.config import CfgNode

from d2_distill import provider
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher, teacher_config

from .data.small_sets import write_coco
from .small_detectors import (
    SavedTeacher,
    batch,
    build,
    detector_cfg,
    distiller_cfg,
    image_input,
    save_teacher,
)


def config(folder, text: str = "VERSION: 2", weights: str = "weights.pth", **overrides) -> CfgNode:
    """Config of a distiller whose teacher's config file has the given text."""
    (folder / "teacher.yaml").write_text(text)
    return distiller_cfg("RetinaNet", SavedTeacher(str(folder / "teacher.yaml"), weights), **overrides)


def test_config_is_the_teachers_own(tmp_path):
    text = "MODEL:\n  WEIGHTS: other.pth\n  RESNETS:\n    DEPTH: 34\n"
    found = teacher_config(config(tmp_path, text, DISTILL__TEACHER__OPTS=["MODEL.FPN.OUT_CHANNELS", 64]))
    assert (found.MODEL.RESNETS.DEPTH, found.MODEL.FPN.OUT_CHANNELS) == (34, 64)
    assert found.MODEL.RESNETS.STEM_OUT_CHANNELS == 64, "of the defaults, not of the student's config"
    assert found.MODEL.WEIGHTS == "weights.pth" and found.MODEL.DEVICE == "cpu"
    assert teacher_config(config(tmp_path, text, weights="")).MODEL.WEIGHTS == "other.pth"


def test_no_config_file_no_teacher():
    assert Teacher.from_config(distiller_cfg("RetinaNet", None)) is None


def test_a_distilled_student_teaches_the_next(tmp_path):
    """Under its distillation's own config file, too; the first teacher is not needed any more."""
    first = save_teacher(tmp_path, "GFL")
    gone = SavedTeacher(str(tmp_path / "gone.yaml"), str(tmp_path / "gone.pth"))
    (tmp_path / "chain.yaml").write_text(distiller_cfg("GFL", gone, ["LD"]).dump())
    chain = SavedTeacher(str(tmp_path / "chain.yaml"), first.weights)
    teacher = Teacher.from_config(distiller_cfg("GFL", chain, ["LD"]))
    assert teacher.staged.kind == "GFL"
    assert teacher.fingerprint() == Teacher.from_config(distiller_cfg("GFL", first, ["LD"])).fingerprint()


def test_teacher_may_come_without_its_data(tmp_path):
    cfg = distiller_cfg("RetinaNet", save_teacher(tmp_path, "RetinaNet"))
    row = ("absent_set", str(tmp_path / "absent.json"), str(tmp_path))
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["DATASETS.COCO", (row,), "DATASETS.TRAIN", ("absent_set",)]
    assert list(Teacher.from_config(cfg).classes) == []


def test_teacher_has_the_classes_of_its_own_data(tmp_path):
    row = write_coco(tmp_path, classes=("ant", "bee", "cow", "dog"))
    saved = save_teacher(tmp_path, "RetinaNet", RETINANET__NUM_CLASSES=4)
    cfg = distiller_cfg("RetinaNet", saved)
    cfg.MODEL.DISTILL.TEACHER.OPTS = [
        "DATASETS.COCO", (row,), "DATASETS.TRAIN", (row[0],), "MODEL.RETINANET.NUM_CLASSES", 80
    ]
    teacher = Teacher.from_config(cfg)
    assert list(teacher.classes) == ["ant", "bee", "cow", "dog"] and teacher.staged.num_classes == 4
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["DATASETS.CLASSES", tuple("wxyz"), "DATASETS.TRAIN", ("absent",)]
    assert list(Teacher.from_config(cfg).classes) == list("wxyz")


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n  NO_SUCH_KEY: 1\n", "MODEL.DISTILL.TEACHER: .* not valid: .*NO_SUCH_KEY"),
        ("MODEL:\n  META_ARCHITECTURE: 5\n", "MODEL.DISTILL.TEACHER: .* not valid: .*META_ARCHITECTURE"),
        ("MODEL: [1, 2\n", "MODEL.DISTILL.TEACHER: .* not valid: .*expected"),
        ("", "teacher.yaml is empty"),
        ("- MODEL", "teacher.yaml is a list"),
        ("_BASE_: missing.yaml\n", "missing.yaml, which .*teacher.yaml names in _BASE_, does not exist"),
    ],
)
def test_invalid_config_file(tmp_path, text, message):
    cfg = config(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        teacher_config(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "opts", [["MODEL.NO_SUCH_KEY", 1], ["MODEL.RESNETS.DEPTH"], ["MODEL.RESNETS.DEPTH", "x"]]
)
def test_invalid_overrides(tmp_path, opts):
    with pytest.raises(UserError, match="MODEL.DISTILL.TEACHER: .*with the overrides OPTS is not valid"):
        teacher_config(config(tmp_path, DISTILL__TEACHER__OPTS=opts))


def test_missing_config_file(tmp_path):
    cfg = distiller_cfg("RetinaNet", SavedTeacher(str(tmp_path / "absent.yaml"), "weights.pth"))
    with pytest.raises(UserError, match="MODEL.DISTILL.TEACHER.CONFIG_FILE: there is no file .*absent.yaml"):
        teacher_config(cfg)


def test_missing_weights(tmp_path):
    with pytest.raises(UserError, match="MODEL.DISTILL.TEACHER.WEIGHTS is empty and so is MODEL.WEIGHTS"):
        teacher_config(config(tmp_path, "MODEL: {WEIGHTS: ''}", weights=""))
    saved = save_teacher(tmp_path, "RetinaNet")
    absent = SavedTeacher(saved.config_file, str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="MODEL.DISTILL.TEACHER.WEIGHTS: there is no file .*absent.pth"):
        Teacher.from_config(distiller_cfg("RetinaNet", absent))


def test_incompatible_image_formats(tmp_path):
    with pytest.raises(UserError, match="INPUT.FORMAT is BGR for the student and L for the teacher"):
        teacher_config(config(tmp_path, "INPUT: {FORMAT: L}"))
    assert teacher_config(config(tmp_path, "INPUT: {FORMAT: RGB}")).INPUT.FORMAT == "RGB"


def test_a_teacher_may_be_a_distilled_student(tmp_path):
    """Its config then names the distiller, which is not built again."""
    save_teacher(tmp_path, "RetinaNet")
    cfg = distiller_cfg("RetinaNet", SavedTeacher("absent.yaml", "absent.pth"))
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    saved = SavedTeacher(str(tmp_path / "distilled.yaml"), str(tmp_path / "teacher.pth"))
    assert Teacher.from_config(distiller_cfg("RetinaNet", saved)).staged.kind == "RetinaNet"


ZOO = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
real_only = pytest.mark.skipif(provider.name() == "embedded", reason="the embedded Detectron2 has no model zoo")


@real_only
@pytest.mark.parametrize(
    "weights, opts, expected",
    [
        ("", [], r"https://.*/detectron2/COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1\.pkl"),
        ("mine.pth", [], r"mine\.pth"),
        ("", ["MODEL.WEIGHTS", "mine.pth"], r"mine\.pth"),
    ],
)
def test_model_zoo_names(weights, opts, expected):
    """Not the backbone that the zoo's config starts from."""
    found = teacher_config(distiller_cfg("RetinaNet", SavedTeacher(ZOO, weights), DISTILL__TEACHER__OPTS=opts))
    assert found.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and found.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert re.fullmatch(expected, found.MODEL.WEIGHTS)


@real_only
@pytest.mark.parametrize(
    "name, message",
    [
        ("COCO-Detection/none.yaml", "CONFIG_FILE: there is no file .*, nor has the model zoo this config"),
        ("Base-RCNN-FPN.yaml", "WEIGHTS is empty, and Detectron2's model zoo has no trained checkpoint of Base-RCNN"),
    ],
)
def test_what_the_model_zoo_lacks(name, message):
    with pytest.raises(UserError, match=f"MODEL.DISTILL.TEACHER.{message}"):
        teacher_config(distiller_cfg("RetinaNet", SavedTeacher(name, "")))


@pytest.mark.skipif(provider.name() != "embedded", reason="the real Detectron2 has a model zoo")
def test_the_model_zoo_needs_the_real_detectron2():
    with pytest.raises(UserError, match="no file COCO-Detection.* need the real Detectron2, and this is the embed"):
        teacher_config(distiller_cfg("RetinaNet", SavedTeacher(ZOO, "")))


def run(teacher: Teacher, student, inputs):
    images = student.preprocess_image(inputs)
    alike = teacher.normalises_like(stage_detector(student), "BGR")
    return teacher.run(inputs, images, student_format="BGR", normalises_alike=alike), images


def test_batch_is_shared_where_models_normalise_alike():
    student = build(detector_cfg("RetinaNet"))
    found, images = run(Teacher(build(detector_cfg("FCOS")), input_format="BGR"), student, batch())
    assert found.images is images and not found.with_gradient


@pytest.mark.parametrize(
    "input_format, overrides",
    [
        ("RGB", {}),
        ("BGR", {"PIXEL_MEAN": [10.0, 20.0, 30.0]}),
        ("BGR", {"PIXEL_STD": [57.0, 58.0, 59.0]}),
        ("RGB", {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}),
    ],
)
def test_own_preprocessing(input_format, overrides):
    """Features are those of the teacher run on its own, on images in its own format."""
    student, model = build(detector_cfg("RetinaNet")), build(detector_cfg("FCOS", **overrides), salt=1)
    found, images = run(Teacher(model, input_format=input_format), student, batch())
    inputs = batch()
    if input_format == "RGB":
        inputs = [{**x, "image": x["image"][[2, 1, 0]]} for x in inputs]
    expected = model.backbone(model.preprocess_image(inputs).tensor)
    assert found.images is not images
    assert all(torch.equal(feature, expected[name]) for name, feature in found.features.items())


def test_own_padding():
    """A teacher whose sizes must be divisible by more than the student's."""
    shallow = detector_cfg(
        "RetinaNet", RESNETS__OUT_FEATURES=["res3", "res4"], FPN__IN_FEATURES=["res3", "res4"],
        RETINANET__IN_FEATURES=["p3", "p4"], ANCHOR_GENERATOR__SIZES=[[16], [32]],
    )
    teacher = Teacher(build(detector_cfg("FCOS")), input_format="BGR")
    found, images = run(teacher, build(shallow), [image_input(80, 80)])
    assert images.tensor.shape[-2:] == (80, 80) and found.images.tensor.shape[-2:] == (96, 96)
    assert found.features["p3"].shape[-2:] == (12, 12)
