"""Settings of configs/head/ and of its students as published, where they were, and otherwise as chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from d2_distill.detectors.building import plain_config

# HEAD's students have OpenMMLab's conventions, the published iterations and clipped gradients.
STUDENTS = re.compile(
    r"configs/(head/|baselines/COCO-Detection/((openmmlab|fcos)_.*(R_18|MNV2)_FPN_1x_ms"
    r"|openmmlab_retinanet_R_50_FPN_2x_ms))"
)

# Of each term: weight, iterations of the warm-up, and the last iteration that it counts in, if any.
_HEAD = {"loss_assist": (1, 0, None), "loss_akd": (2, 2000, None), "loss_ckd": (2, 2000, None)}
_ASSIST = {"loss_assist": (1, 0, None)}
_FCOS_HEAD = {"loss_assist": (1, 2000, None), "loss_akd": (2, 2000, None), "loss_ckd": (1, 2000, 7330 * 11)}
_CASCADE_HEAD = {"loss_assist": (1, 2000, None), "loss_akd": (1, 2000, None), "loss_ckd": (2, 2000, None)}
_DENSE_HEAD = {"loss_assist": (1, 2000, None), "loss_akd": (1, 2000, None), "loss_ckd": (1, 2000, None)}


def _tf_head(stop):
    return {
        "loss_assist_dense": (0.5, 2000, None),
        "loss_assist_rcnn": (1, 2000, None),
        "loss_cross_dense": (1, 2000, stop),
        "loss_cross_rcnn": (1.3, 2000, stop),
    }


TERMS = {
    "retinanet_R_18_from_R_50_FPN_1x_ms_fitnet": {"loss_imitation": (1, 0, None)},
    "retinanet_R_18_FPN_1x_ms_tf_head": _tf_head(7330 * 8),
    "retinanet_MNV2_FPN_1x_ms_tf_head": _tf_head(7330 * 8),
    "retinanet_R_50_FPN_2x_ms_tf_head": _tf_head(7330 * 16),
    "retinanet_R_18_FPN_1x_ms_tf_head_fcos": {
        "loss_assist_dense": (1, 2000, None),
        "loss_cross_dense": (1, 2000, 7330 * 8),
    },
    # An assistant and teachers of which no setting was published.
    "retinanet_R_18_FPN_1x_ms_assist_tood": {"loss_assist_dense": (1, 0, None)},
    "retinanet_R_18_from_fcos_R_50_FPN_1x_ms": _DENSE_HEAD,
    "retinanet_R_18_from_atss_R_50_FPN_1x_ms": _DENSE_HEAD,
    "retinanet_R_18_from_gfl_R_50_FPN_1x_ms": _DENSE_HEAD,
    "retinanet_R_18_from_tood_R_50_FPN_1x_ms": _DENSE_HEAD,
}
for _backbone in ("R_18", "MNV2"):
    _retinanet = f"retinanet_{_backbone}_from_faster_rcnn_R_50_FPN_1x_ms"
    TERMS.update({
        f"retinanet_{_backbone}_FPN_1x_ms_assist": _ASSIST,
        f"{_retinanet}_akd": {term: _HEAD[term] for term in ("loss_assist", "loss_akd")},
        _retinanet: _HEAD,
        f"fcos_{_backbone}_from_faster_rcnn_R_50_FPN_1x_ms": _FCOS_HEAD,
        f"faster_rcnn_{_backbone}_from_cascade_rcnn_R_50_FPN_1x_ms": _CASCADE_HEAD,
        f"fcos_{_backbone}_FPN_1x_ms_tf_head": _tf_head(7330 * 8),
    })


def assert_weights(name: str, methods) -> None:
    """The built method weighs its terms as published, at all iterations."""
    [method] = methods.values()
    assert set(method.weights) == set(TERMS[name])
    for term, (weight, warmup, last) in TERMS[name].items():
        for iteration in (0, 1, 500, 2000, 58640, 58641, 80630, 80631, 117280, 117281):
            risen = min(iteration / warmup, 1) if warmup else 1
            expected = weight * risen * (last is None or iteration <= last)
            assert method.weight_at(term, iteration) == pytest.approx(expected), (term, iteration)


def assert_student(path: str, cfg: CfgNode) -> None:
    """Solver, data, backbone and head of a student, and the R-CNN assistant that its config describes."""
    solver, clipping, backbone = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS, cfg.MODEL.BACKBONE
    assert clipping.ENABLED and clipping.CLIP_TYPE == "full_model"
    assert (clipping.CLIP_VALUE, clipping.NORM_TYPE) == (20, 2)
    assert (solver.WARMUP_METHOD, solver.WARMUP_FACTOR) == ("linear", 0.001)
    if "_2x_" in path:
        assert (solver.LR_SCHEDULER_NAME, solver.BASE_LR_END) == ("WarmupCosineLR", 3e-4)
        assert solver.MAX_ITER == 7330 * 24
    else:
        assert solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.GAMMA == 0.1
        assert (*solver.STEPS, solver.MAX_ITER) == (7330 * 8, 7330 * 11, 7330 * 12)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((640, 800), "range")
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1333, 800, 1333)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    if "MNV2" in Path(path).stem.partition("_from_")[0]:
        assert (backbone.FREEZE_AT, backbone.FIXED_BN_STATISTICS) == (0, False)
        assert (cfg.MODEL.MOBILENETV2.ACTIVATION, cfg.MODEL.MOBILENETV2.NORM) == ("LeakyReLU", "BN")
        assert tuple(cfg.MODEL.MOBILENETV2.OUT_STAGES) == (1, 2, 4, 7)
    else:
        assert (backbone.FREEZE_AT, backbone.FIXED_BN_STATISTICS) == (2, True)
    student = plain_config(cfg).MODEL.META_ARCHITECTURE
    if student == "OpenMMLabRetinaNet":
        assert (cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE, cfg.MODEL.FPN.TOP_BLOCK_RELU) == ("res5", False)
        assert cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA == 0
    if student == "OpenMMLabFCOS":
        fcos = cfg.MODEL.FCOS
        assert (fcos.DISTANCES, fcos.CENTERNESS_ON, fcos.CENTER_SAMPLING_RADIUS) == ("exp", "cls", 0)
        assert (fcos.BOX_LOSS, fcos.NORM) == ("iou", "GN")
    # Proposals of the training, and the assistant's head.
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN) == (2000, 1000)
    assert cfg.MODEL.RPN.NMS_THRESH == 0.7 and cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE == 0
    head, node = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
    assert (head.NUM_FC, head.FC_DIM, head.POOLER_RESOLUTION, head.SMOOTH_L1_BETA) == (2, 1024, 7, 0)
    assert (node.BATCH_SIZE_PER_IMAGE, node.POSITIVE_FRACTION, node.IOU_THRESHOLDS) == (512, 0.25, [0.5])


def assert_assistants(name: str, cfg: CfgNode) -> None:
    """The one-stage assistant of TF-HEAD."""
    dense = "OpenMMLabRetinaNet" if name.startswith("fcos") else "OpenMMLabFCOS"
    node, fcos = cfg.MODEL.DISTILL.TF_HEAD, cfg.MODEL.FCOS
    assert (node.DENSE_ASSISTANT, node.PER_ANCHOR) == (dense, True)
    if dense == "OpenMMLabFCOS":
        plain = name.endswith("_fcos")
        assert (fcos.DISTANCES, fcos.CENTERNESS_ON, fcos.CENTER_SAMPLING_RADIUS) == (
            ("exp", "cls", 0) if plain else ("relu", "box", 1.5)
        )
        assert (fcos.NUM_CONVS, fcos.NORM, fcos.TOWER_BIAS, fcos.BOX_LOSS) == (4, "GN", True, "giou")
