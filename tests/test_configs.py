"""Every config in configs/ builds, with its teacher and methods if it has any, and has the published settings."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer
from torch.utils._python_dispatch import TorchDispatchMode

from d2_distill.apps.conversion.openmmlab import Checkpoint, convert_openmmlab
from d2_distill.checkpoint.torchvision import is_address, require_fitting
from d2_distill.config.pretrained import corrections
from d2_distill.config.reading import read_config
from d2_distill.detectors.building import DISTILLER, build_detector, plain_config
from d2_distill.distiller import inherit
from d2_distill.engine.setup import load_config
from d2_distill.methods.automatic import build_chosen_methods, is_auto
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher, teacher_config

from . import published_head
from .tools import openmmlab_models

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert_openmmlab as openmmlab_tool  # noqa: E402

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
# Configs that follow OpenMMLab's recipe and not Detectron2's.
OPENMMLAB = re.compile(
    r"configs/(ld|head|(baselines|crosskd|imitation)/(.*/)?"
    r"(gfl|atss|fcos|tood|openmmlab|.*_dist|retinanet_(Swin|MNV2)))"
)
TRAINING_IMAGES = {"coco_2017_train": 117266, "voc_2007_trainval": 5011, "voc_2012_trainval": 11540}

# Published settings of configs/ld/ by OpenMMLab's keys: factor of a row, one distribution, in main LD and in VLR LD
# (loss_weight times an extra factor, over avg_factor); weight and temperature of main KD; weight of the imitation;
# images a GPU.
_GFL = (0.25 / 4, 0.25 / 16)
_MAIN = (0.25 / 4, 0)
_FULL_KD = (10, 2)
PUBLISHED = {
    "COCO-Detection/gfl_R_18_from_R_101_FPN_1x": (*_GFL, _FULL_KD, 0, 3),
    "COCO-Detection/gfl_R_34_from_R_101_FPN_1x": (*_GFL, _FULL_KD, 0, 3),
    "COCO-Detection/gfl_R_50_from_R_101_FPN_1x": (*_GFL, _FULL_KD, 0, 2),
    "COCO-Detection/gfl_R_101_from_R_101_DCN_FPN_2x_ms": (*_GFL, _FULL_KD, 0, 3),
    "COCO-Detection/gfl_R_50_from_R_101_FPN_1x_finegrained": (*_GFL, _FULL_KD, 2, 2),
    "COCO-Detection/gfl_R_50_from_R_101_FPN_1x_gibox": (*_GFL, _FULL_KD, 2, 2),
    "COCO-Detection/gfl_R_18_from_R_101_FPN_1x_gibox": (*_GFL, _FULL_KD, 0.2, 3),
    "COCO-Detection/gfl_R_18_from_R_101_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gfl_R_34_from_R_101_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gfl_R_50_from_R_101_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gfl_R_101_from_R_101_DCN_FPN_2x_ms_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gfl_R_18_from_R_18_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gfl_R_50_from_R_50_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gflv2_R_50_from_R_101_FPN_1x": (*_GFL, _FULL_KD, 0, 3),
    "COCO-Detection/gflv2_R_50_from_R_101_FPN_1x_gibox": (*_GFL, _FULL_KD, 2, 3),
    "COCO-Detection/gflv2_R_101_from_R_101_DCN_FPN_2x_ms": (*_GFL, (5, 2), 0, 2),
    "COCO-Detection/gflv2_R_101_from_R_101_DCN_FPN_2x_ms_gibox": (*_GFL, (5, 2), 2, 2),
    "COCO-Detection/gfl_X_101_32x4d_DCN_from_X_101_32x4d_DCN_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "COCO-Detection/gflv2_X_101_32x4d_DCN_from_R2_101_DCN_FPN_2x_ms": (*_GFL, (5, 2), 0, 2),
    "COCO-Detection/gflv2_X_101_32x4d_DCN_from_R2_101_DCN_FPN_2x_ms_gibox": (*_GFL, (5, 2), 1, 2),
    "COCO-Detection/atss_R_50_from_R_101_FPN_1x": (0.25 / 4, 0.15 * 0.25 / 4, _FULL_KD, 0, 2),
    "COCO-Detection/fcos_R_50_from_R_101_FPN_1x": (0.25 / 4, 0.25 * 0.25 / 4, _FULL_KD, 0, 2),
    "COCO-Detection/retinanet_R_50_from_R_101_FPN_1x": (5 / 4, 0.03 * 5 / 4, (10, 8), 0, 2),
    "PascalVOC-Detection/gfl_R_18_from_R_101_FPN_1x": (*_GFL, _FULL_KD, 0, 3),
    "PascalVOC-Detection/gfl_R_18_from_R_101_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "PascalVOC-Detection/gfl_R_18_from_R_101_FPN_1x_vlr_kd": (*_GFL, None, 0, 3),
    "PascalVOC-Detection/gfl_R_18_from_R_101_FPN_1x_gibox": (*_GFL, (3, 10), 0.2, 2),
    "PascalVOC-Detection/gfl_R_34_from_R_101_DCN_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "PascalVOC-Detection/gfl_R_50_from_R_101_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "PascalVOC-Detection/gfl_R_101_from_R_101_DCN_FPN_1x_main_ld": (*_MAIN, None, 0, 3),
    "PascalVOC-Detection/gfl_R_18_from_R_18_FPN_3x": (*_GFL, _FULL_KD, 0, 3),
    "PascalVOC-Detection/gflv2_R_18_from_R_101_FPN_gibox": (*_GFL, (5, 2), 2, 2),
}

# Settings of configs/crosskd/ as published: where both towers are tapped, weight and exponent of the class
# term, loss and weight of the box term, weight of the centerness term; weight of PKD.
_GFL_CROSSKD = (3, (1, 1), ("kl", 4), 0)
_RETINANET_CROSSKD = (3, (1, 1), ("giou", 1), 0)
_FCOS_CROSSKD = (2, (0.4, 1), ("iou", 0.75), 0)
_ATSS_CROSSKD = (3, (1, 1), ("giou", 1), 1)
PUBLISHED_CROSSKD = {
    "gfl_R_50_from_R_101_FPN_1x": (_GFL_CROSSKD, 0),
    "gfl_R_50_from_R_101_FPN_1x_pkd": (_GFL_CROSSKD, 6),
    "gfl_R_18_from_R_50_FPN_1x": (_GFL_CROSSKD, 0),
    "openmmlab_retinanet_R_50_from_R_101_FPN_2x": (_RETINANET_CROSSKD, 0),
    "openmmlab_retinanet_R_50_from_R_101_FPN_2x_pkd": (_RETINANET_CROSSKD, 2),
    "openmmlab_retinanet_R_18_from_R_50_FPN_1x": (_RETINANET_CROSSKD, 0),
    "openmmlab_retinanet_R_50_from_Swin_T_FPN_1x": (_RETINANET_CROSSKD, 0),
    "fcos_R_50_from_R_101_FPN_2x_ms": (_FCOS_CROSSKD, 0),
    "fcos_R_50_from_R_101_FPN_2x_ms_pkd": (_FCOS_CROSSKD, 2),
    "atss_R_50_from_R_101_FPN_1x": (_ATSS_CROSSKD, 0),
    "atss_R_50_from_R_101_FPN_1x_pkd": (_ATSS_CROSSKD, 1),
    # Pairs of which only results were published: settings of the teacher's detector. GFL has no centerness.
    "gfl_R_50_from_atss_R_101_FPN_1x": ((*_ATSS_CROSSKD[:3], 0), 0),
    "gfl_R_50_from_retinanet_R_101_FPN_1x": (_RETINANET_CROSSKD, 0),
    "openmmlab_retinanet_MNV2_from_R_50_FPN_1x": (_RETINANET_CROSSKD, 0),
    # A detector that was not published with CrossKD.
    "tood_R_18_from_R_50_FPN_1x": (_RETINANET_CROSSKD, 0),
    # Detectron2's own RetinaNet.
    "retinanet_R_50_from_R_101_FPN_1x": (_RETINANET_CROSSKD, 0),
    "retinanet_R_50_from_R_101_FPN_1x_pkd": (_RETINANET_CROSSKD, 2),
    "retinanet_R_18_from_R_50_FPN_1x": (_RETINANET_CROSSKD, 0),
}
# Two-stage detectors: weights, and temperature of the class term.
PUBLISHED_CROSSKD_ROI = {
    "faster_rcnn_R_18_from_R_50_FPN_1x_roi": ({"loss_crosskd_roi_cls": 0.5, "loss_crosskd_roi_box": 1}, 3)
}
# (IoU of the NMS, least score) of each detector in configs/crosskd/, as published.
PUBLISHED_TEST = {
    "GFL": (0.6, 0.05),
    "ATSS": (0.6, 0.05),
    "TOOD": (0.6, 0.05),
    "RETINANET": (0.5, 0.05),
    "FCOS": (0.5, 0.05),
}

# Settings of configs/msad/reference/ as published: images, rate, last drop, iterations, checkpoint period; norm; width.
PUBLISHED_MSAD = {
    "fcos_SLR25_FPN_1x_ms_teacher": (16, 0.01, 80000, 90000, 40000, "SyncBN", 0.25),
    "fcos_SLR50_FPN_1x_ms_teacher": (8, 0.01, 160000, 180000, 80000, "SyncBN", 0.5),
    "fcos_SLR75_FPN_1x_ms_teacher": (8, 0.01, 160000, 180000, 80000, "SyncBN", 0.75),
    "fcos_SLR100_FPN_1x_ms_teacher": (8, 0.01, 160000, 180000, 20000, "SyncBN", 1.0),
    "fcos_R_50_FPN_1x_ms_teacher": (8, 0.01, 160000, 180000, 40000, "SyncBN", None),
    "fcos_SLMNV2_100_FPN_ms_teacher": (2, 0.01, 160000, 180000, 20000, "BN", 1.0),
    "fcos_SLR25_FPN_1x_ms_student": (32, 0.02, 40000, 45000, 40000, "SyncBN", 0.25),
    "fcos_SLR50_FPN_1x_ms_student": (32, 0.01, 40000, 45000, 40000, "SyncBN", 0.5),
    "fcos_SLR75_FPN_1x_ms_student": (32, 0.02, 40000, 45000, 40000, "SyncBN", 0.75),
    "fcos_SLR100_FPN_1x_ms_student": (16, 0.01, 80000, 90000, 40000, "SyncBN", 1.0),
}

# OpenMMLab checkpoints that teachers are converted from: detector, backbone, input channels of P6.
ORIGINALS = {
    "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth": ("gfl", "resnet101", 256),
    "gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth": ("gfl", "resnet50", 256),
    "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth": ("retinanet", "resnet101", 2048),
    "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth": ("retinanet", "resnet50", 2048),
    "retinanet_r50_fpn_mstrain_3x_coco_20210718_220633-88476508.pth": ("retinanet", "resnet50", 2048),
    "faster_rcnn_r50_fpn_mstrain_3x_coco_20210524_110822-e10bd31c.pth": ("faster_rcnn", "resnet50", 0),
    "retinanet_swin-t-p4-w7_fpn_1x_coco.pth": ("retinanet", "swin", 768),
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth": ("fcos", "resnet101", 256),
    "atss_r101_fpn_1x_20200825-dfcadd6f.pth": ("atss", "resnet101", 256),
}
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": [7, 7]}
# Keys on which neither weights nor detections depend.
FOR_TRAINING = re.compile(r"MODEL\.(WEIGHTS|DEVICE|BACKBONE\.FREEZE_AT|DISTILL\..*|\w+\.\w*LOSS\w*)")


class NoRandomFill(TorchDispatchMode):
    """New parameters are 0; drawing them takes most of the time that big detectors need."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def project_root(monkeypatch):
    """Configs name each other relative to the project's root, where train_net.py is started."""
    monkeypatch.chdir(ROOT)


def read(path: str):
    """A config and that of its teacher, if it has one."""
    cfg = load_config(path, ["MODEL.DEVICE", "cpu"])
    taught = cfg.MODEL.META_ARCHITECTURE == DISTILLER and cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
    return cfg, teacher_config(cfg) if taught else None


@pytest.mark.parametrize("path", CONFIGS)
def test_builds(path):
    cfg, other = read(path)
    with NoRandomFill():
        student = stage_detector(build_detector(cfg))
        assert student.num_classes > 0
        if is_address(cfg.MODEL.WEIGHTS):
            require_fitting(student.model, cfg.MODEL.WEIGHTS)
        teacher = None
        if other is not None:
            teacher = Teacher(build_detector(other), input_format=other.INPUT.FORMAT, cfg=other)
        if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
            methods = build_chosen_methods(cfg, student, teacher)
            assert is_auto(cfg) or list(methods) == list(cfg.MODEL.DISTILL.METHODS)
            assert all(method.weights for method in methods.values())
            if path.startswith("configs/crosskd/"):
                assert_published_crosskd(Path(path).stem, methods)
            if path.startswith("configs/head/"):
                published_head.assert_weights(Path(path).stem, methods)


@pytest.mark.parametrize("path", CONFIGS)
def test_pixels_are_those_of_the_weights(path):
    """Nothing is left to be corrected, so that the config is right without the file's ``MODEL.WEIGHTS``, too."""
    cfg = read_config(path, [], source=path)
    assert not is_address(cfg.MODEL.WEIGHTS) or not corrections(cfg, cfg.MODEL.WEIGHTS)


def assert_published_crosskd(name: str, methods) -> None:
    if name in PUBLISHED_CROSSKD_ROI:
        method = methods["CrossKDRoI"]
        assert (method.weights, method.temperature) == PUBLISHED_CROSSKD_ROI[name]
        return
    (tap, class_term, box_term, centerness), pkd = PUBLISHED_CROSSKD[name]
    method = methods["CrossKD"]
    taps = {output: crossing.tap for crossing in method.crossings.values() for output in crossing.outputs}
    assert taps["logits"].position == taps["deltas"].position == tap
    assert (method.weights["loss_crosskd_cls"], method.cls_beta) == class_term
    assert (method.box_loss, method.weights["loss_crosskd_box"]) == box_term
    assert method.weights.get("loss_crosskd_centerness", 0) == centerness
    assert method.box_temperature == 1 and not method.adapters
    assert (methods["PKD"].weights["loss_pkd"] if "PKD" in methods else 0) == pkd


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights(name):
    cfg, _ = read(f"configs/ld/{name}.yaml")
    node = cfg.MODEL.DISTILL.LD
    # Ours is the mean over an anchor's distributions, the published loss the sum over rows of one each.
    distributions = {"edge": 4, "anchor": 1}[node.SOFTMAX]
    imitates = "FeatureImitation" in cfg.MODEL.DISTILL.METHODS
    main_kd = (node.MAIN_KD.WEIGHT, node.MAIN_KD.TEMPERATURE) if node.MAIN_KD.WEIGHT else None
    main_ld, vlr_ld, kd, imitation, images = PUBLISHED[name]
    assert node.MAIN_LD.WEIGHT / distributions == pytest.approx(main_ld)
    assert node.VLR_LD.WEIGHT / distributions == pytest.approx(vlr_ld)
    assert node.MAIN_LD.TEMPERATURE == node.VLR_LD.TEMPERATURE == 10
    assert main_kd == kd
    assert bool(node.VLR_KD.WEIGHT) == name.endswith("_vlr_kd")
    assert cfg.MODEL.DISTILL.IMITATION.WEIGHT * imitates == imitation
    assert not (imitates and cfg.MODEL.DISTILL.IMITATION.ADAPTER)
    assert node.REFERENCE_IMAGES == images


def test_published_weights_of_all():
    crosskd = {**PUBLISHED_CROSSKD, **PUBLISHED_CROSSKD_ROI}
    for folder, names in (("ld", PUBLISHED), ("crosskd", crosskd), ("head", published_head.TERMS)):
        expected = {f"configs/{folder}/{name}.yaml" for name in names}
        assert expected == {path for path in CONFIGS if path.startswith(f"configs/{folder}/")}


@pytest.mark.parametrize("name", PUBLISHED_CROSSKD)
def test_published_students_of_crosskd(name):
    """What the published students have besides their settings of CrossKD."""
    cfg, _ = read(f"configs/crosskd/{name}.yaml")
    family = cfg.MODEL.DISTILL.STUDENT.replace("OpenMMLab", "").upper()
    node = cfg.MODEL[family]
    assert (node.NMS_THRESH_TEST, node.SCORE_THRESH_TEST) == PUBLISHED_TEST[family]
    assert (node.TOPK_CANDIDATES_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (1000, 100)
    if family == "GFL":
        assert (node.BOX_LOSS, node.NORMALIZER_FLOOR) == ("giou", 1.0)
    if re.match(r"openmmlab_retinanet_R|gfl|atss|tood|fcos", name):
        assert cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE == "p5"
    if family == "FCOS":
        solver, clipping = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2, 0)
        assert (solver.WARMUP_METHOD, solver.WARMUP_FACTOR) == ("constant", pytest.approx(1 / 3))
        assert (clipping.CLIP_TYPE, clipping.CLIP_VALUE, clipping.NORM_TYPE) == ("full_model", 35, 2)
        assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((640, 800), "choice")
        assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
    if family == "ATSS":
        assert cfg.SOLVER.IMS_PER_BATCH == 8 * cfg.SOLVER.REFERENCE_WORLD_SIZE


@pytest.mark.parametrize("path", [path for path in CONFIGS if published_head.STUDENTS.match(path)])
def test_published_students_of_head(path):
    published_head.assert_student(path, read(path)[0])


@pytest.mark.parametrize("name", [name for name in published_head.TERMS if "tf_head" in name])
def test_published_assistants_of_tf_head(name):
    published_head.assert_assistants(name, read(f"configs/head/{name}.yaml")[0])


def test_published_msad_of_all():
    expected = {f"configs/msad/reference/{name}.yaml" for name in PUBLISHED_MSAD}
    bases = {f"configs/msad/reference/Base-{role}.yaml" for role in ("teacher", "student")}
    assert expected | bases == {path for path in CONFIGS if path.startswith("configs/msad/reference/")}


@pytest.mark.parametrize("name", PUBLISHED_MSAD)
def test_published_msad(name):
    cfg, other = read(f"configs/msad/reference/{name}.yaml")
    *schedule, norm, width = PUBLISHED_MSAD[name]
    solver, model = cfg.SOLVER, cfg.MODEL
    found = [solver.IMS_PER_BATCH, solver.BASE_LR, solver.STEPS[-1], solver.MAX_ITER, solver.CHECKPOINT_PERIOD]
    assert found == schedule and solver.STEPS[0] == schedule[2] * 3 // 4
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.WARMUP_METHOD) == (500, 0.001, "linear")
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (0.9, 1e-4, 0)
    assert not solver.CLIP_GRADIENTS.ENABLED and model.BACKBONE.FREEZE_AT == 0
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800) and cfg.INPUT.MAX_SIZE_TRAIN == 1333
    for side in (cfg, other or cfg):
        assert (side.MODEL.SLIMMABLE.NORM if width else side.MODEL.RESNETS.NORM) == norm
        assert not width or side.MODEL.SLIMMABLE.WIDTH_MULT == width
        assert side.INPUT.FORMAT == "BGR" and side.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
        assert side.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    fcos = model.FCOS
    assert (fcos.NUM_CONVS, fcos.NORM, fcos.PRIOR_PROB, fcos.NUM_CLASSES) == (4, "GN", 0.01, 80)
    assert (fcos.SIZES_OF_INTEREST, fcos.CENTER_SAMPLING_RADIUS) == ([64, 128, 256, 512], 1.5)
    assert (fcos.SCORE_THRESH_TEST, fcos.TOPK_CANDIDATES_TEST, fcos.NMS_THRESH_TEST) == (0.05, 1000, 0.6)
    assert (fcos.BOX_LOSS, fcos.IOU_OFFSET, fcos.DISTANCES, fcos.CENTERNESS_ON) == ("giou", 1.0, "relu", "box")
    assert (fcos.INFERENCE, fcos.THRESH_WITH_CTR, cfg.TEST.DETECTIONS_PER_IMAGE) == ("adelaidet", False, 100)
    assert (fcos.TOWER_BIAS, fcos.PREDICTOR_BIAS) == (True, False)
    if other is None:
        assert (model.MSAD.JOINT_WEIGHT, model.MSAD.FACTOR, model.MSAD.FUSION_REDUCTION) == (0.4, 2, 16)
        return
    distill = model.DISTILL
    assert (distill.METHODS, distill.MSAD.WEIGHT, distill.MSAD.SCHEDULE) == (("MSAD",), 0.6, [["Warmup", 500]])
    assert distill.TEACHER.BATCH_STATISTICS and model.WEIGHTS == ""


@pytest.mark.parametrize("path", [path for path in CONFIGS if re.search(r"msad.*student", path)])
def test_students_of_msad_start_as_their_teachers(path):
    """Every tensor is inherited, but the differences are none of what the detector is."""
    cfg, other = read(path)
    with NoRandomFill():
        student, teacher = build_detector(cfg), build_detector(other)
    for value in teacher.state_dict().values():
        value.fill_(3)
    inherit(student, teacher, cfg.MODEL.DISTILL.INHERIT)
    assert all((value == 3).all() for value in student.state_dict().values())
    assert cfg.INPUT == other.INPUT
    family = cfg.MODEL.DISTILL.STUDENT.replace("OpenMMLab", "")
    assert cfg.MODEL[family] == other.MODEL[family] and cfg.MODEL.PIXEL_MEAN == other.MODEL.PIXEL_MEAN
    assert cfg.MODEL.MSAD.FACTOR == cfg.MODEL.LOW_RESOLUTION.FACTOR == other.MODEL.MSAD.FACTOR


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.startswith("configs/msad/") and "_1x_" in path])
def test_the_schedule_of_msad_is_scaled_to_the_gpus(path):
    """Two GPUs instead of eight: a quarter of the batch and the rate, four times the iterations."""
    cfg, _ = read(path)
    scaled = DefaultTrainer.auto_scale_workers(cfg, 2).SOLVER
    solver = cfg.SOLVER
    assert (scaled.IMS_PER_BATCH, scaled.BASE_LR) == (solver.IMS_PER_BATCH // 4, pytest.approx(solver.BASE_LR / 4))
    assert (scaled.MAX_ITER, scaled.STEPS) == (4 * solver.MAX_ITER, tuple(4 * step for step in solver.STEPS))


@pytest.mark.parametrize("path", [path for path in CONFIGS if re.search(r"_\dx", path)])
def test_schedule_is_that_of_the_name(path):
    """1x is 12 passes over the data."""
    cfg, _ = read(path)
    images = sum(TRAINING_IMAGES[name] for name in cfg.DATASETS.TRAIN)
    passes = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    assert passes == pytest.approx(12 * int(re.search(r"_(\d)x", path)[1]), rel=0.03)
    assert all(step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)
    if OPENMMLAB.match(path):
        assert (len(set(cfg.INPUT.MIN_SIZE_TRAIN)) > 1) == ("_ms" in path)


@pytest.mark.parametrize("path", [path for path in CONFIGS if OPENMMLAB.match(path)])
def test_solver(path):
    """A learning rate in proportion to the batch, and no exception for norms in the weight decay."""
    cfg, _ = read(path)
    solver = cfg.SOLVER
    rate = 0.02 if plain_config(cfg).MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else 0.01
    if solver.OPTIMIZER == "AdamW":  # ConvNeXt's
        assert (solver.BASE_LR / solver.IMS_PER_BATCH, solver.WEIGHT_DECAY) == (pytest.approx(1e-4 / 16), 0.05)
        assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY_BIAS == 0 and not solver.CLIP_GRADIENTS.ENABLED
        return
    rate *= 3 if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" else 1
    assert solver.BASE_LR / solver.IMS_PER_BATCH == pytest.approx(rate / 16)
    assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY == 1e-4
    assert (solver.MOMENTUM, solver.WARMUP_ITERS) == (0.9, 500)
    clips = re.search(r"/(fcos_R_.*_2x_ms(_pkd)?|openmmlab_faster_rcnn_R_50_FPN_1x)\.yaml", path)
    clips = clips or published_head.STUDENTS.match(path)
    assert solver.CLIP_GRADIENTS.ENABLED == bool(clips)


@pytest.mark.parametrize("path", CONFIGS)
def test_output_folders(path):
    """No run writes into its teacher's folder, and the teacher is looked for where its own config puts it."""
    cfg, other = read(path)
    assert cfg.OUTPUT_DIR in ("./output", f"output/{path[len('configs/') : -len('.yaml')]}")
    if other is None or other.MODEL.WEIGHTS.startswith("detectron2://"):
        return
    assert cfg.OUTPUT_DIR != other.OUTPUT_DIR
    if other.MODEL.WEIGHTS not in CONVERTED:
        assert other.MODEL.WEIGHTS == f"{other.OUTPUT_DIR}/model_final.pth"


def conversion_command(path: str):
    """Arguments of tools/convert_openmmlab.py in the comment of a config, if it has one."""
    text = (ROOT / path).read_text()
    found = re.search(r"# python tools/convert_openmmlab\.py ((?:.*\\\n)*.*)", text)
    if found:
        words = shlex.split(re.sub(r"\\\n\s*#", " ", found[1]))
        return openmmlab_tool.parser().parse_intermixed_args(words)


CONVERSIONS = {path: command for path in CONFIGS for command in [conversion_command(path)] if command}
CONVERTED = {str(command.output) for command in CONVERSIONS.values()}


@pytest.mark.parametrize("path", CONVERSIONS)
def test_converted_teachers(path, monkeypatch):
    """The command in the comment makes the teacher's weights, for just the model of the teacher's config."""
    _, other = read(path)
    command = CONVERSIONS[path]
    assert other.MODEL.WEIGHTS == str(command.output)
    layout = Checkpoint(zoo_layout(monkeypatch, *ORIGINALS[str(command.input)]), "")
    conversion = convert_openmmlab(layout, style=command.style, opts=command.opts)
    expected, found = (flat(cfg.MODEL, "MODEL") for cfg in (conversion.cfg, other))
    different = {key for key in found if found[key] != expected[key] and not FOR_TRAINING.fullmatch(key)}
    if "swin" in other.MODEL.BACKBONE.NAME:
        different = {key for key in different if not key.startswith("MODEL.RESNETS.")}
    assert not different and other.INPUT.FORMAT == conversion.cfg.INPUT.FORMAT


def zoo_layout(monkeypatch, detector: str, backbone: str, p6_channels: int):
    """Names and shapes of a published checkpoint."""
    for name, value in (("CHANNELS", 256), ("NUM_CLASSES", 80), ("NUM_CONVS", 4), ("SWIN", SWIN_T)):
        monkeypatch.setattr(openmmlab_models, name, value)
    with torch.device("meta"):
        if detector == "faster_rcnn":
            body = openmmlab_models.resnet_state(openmmlab_models.resnet(backbone))
            neck = openmmlab_models.neck_state([256, 512, 1024, 2048], channels=256)
            return {**body, **neck, **openmmlab_models.two_stage_state(fc_dim=1024)}
        if backbone == "swin":
            body, channels = openmmlab_models.swin_state(openmmlab_models.swin()), [192, 384, 768]
        else:
            body = openmmlab_models.resnet_state(openmmlab_models.resnet(backbone))
            channels = [512, 1024, 2048]
        neck = openmmlab_models.neck_state(channels, p6_channels=p6_channels, channels=256)
        return {**body, **neck, **openmmlab_models.head_state(detector)}


def flat(node, prefix: str):
    """Key -> value of a config node, by full names."""
    values = {}
    for key, value in node.items():
        name = f"{prefix}.{key}"
        values.update(flat(value, name) if hasattr(value, "items") else {name: value})
    return values
