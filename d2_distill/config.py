"""Every configuration key that d2_distill adds to Detectron2's."""

from __future__ import annotations

from typing import Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .errors import UserError


def get_distill_cfg() -> CN:
    """Detectron2's default config with the keys of :func:`add_distill_config`."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


def read_config(config_file: str, opts: Sequence, *, source: str) -> CN:
    """The defaults, overridden by a config file ("" for none), overridden by a flat list of keys and values.

    Args:
        source: what the error message calls the config.

    Raises:
        UserError: the file is missing or malformed, or a key or the type of a value is wrong.
    """
    cfg = get_distill_cfg()
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except Exception as error:  # whatever Detectron2, yacs or the YAML parser raise on a malformed file
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise UserError(f"{source} is not valid: {reason}; correct it.") from error
    return cfg


def add_distill_config(cfg: CN) -> None:
    """Add d2_distill's keys, with their defaults, to a Detectron2 config."""
    # User data sets, registered before anything is built; relative paths are below $DETECTRON2_DATASETS
    # (default: "datasets").
    # COCO format: rows of (name, json_file, image_root).
    cfg.DATASETS.COCO = ()
    # Pascal VOC folders: rows of (name, dirname, split, class_names, year).
    cfg.DATASETS.VOC = ()

    # "SGD" (Detectron2's) or "AdamW"; both take BASE_LR, WEIGHT_DECAY* and BIAS_LR_FACTOR.
    cfg.SOLVER.OPTIMIZER = "SGD"

    _add_fcos_config(cfg)
    _add_distiller_config(cfg)


def _add_fcos_config(cfg: CN) -> None:
    # Detectron2 has FCOS, but no config for it; the defaults are those of its constructor.
    fcos = cfg.MODEL.FCOS = CN()
    fcos.NUM_CLASSES = 80
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CONVS = 4
    # Norm in the towers: "" or a name that detectron2.layers.get_norm knows.
    fcos.NORM = "GN"
    fcos.PRIOR_PROB = 0.01
    # A location is positive within this many strides of a box's centre.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6


def _add_distiller_config(cfg: CN) -> None:
    # MODEL.META_ARCHITECTURE: "Distiller" trains the detector that the usual keys describe, with a teacher.
    distill = cfg.MODEL.DISTILL = CN()
    # Meta-architecture of the student, e.g. "RetinaNet".
    distill.STUDENT = "RetinaNet"
    # Names from DISTILL_METHOD_REGISTRY; their loss terms add up.
    distill.METHODS = ()
    # Dotted module names copied from the teacher into the student before training (HEAD's "weight transfer"),
    # e.g. ("head",). Shapes must agree; the copies stay trainable.
    distill.INHERIT = ()

    distill.TEACHER = CN()
    # A config file of its own, as for any Detectron2 model, or a name of Detectron2's model zoo if installed.
    distill.TEACHER.CONFIG_FILE = ""
    # Checkpoint; "" takes MODEL.WEIGHTS of the teacher's config.
    distill.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: a flat list of keys and values.
    distill.TEACHER.OPTS = []

    # SCHEDULE of every method: factors on its weights by iteration, which are multiplied, e.g.
    # [["Warmup", 2000], ["EarlyStop", 58640]]; see schedules.py.

    # CrossKD (CVPR 2024): student tower features through the rest of the teacher's head.
    crosskd = distill.CROSSKD = CN()
    # Number of student tower blocks in front of the tap, 0 (the FPN map) to the tower's length.
    crosskd.TAP = 3
    crosskd.CLS_WEIGHT = 1.0
    # Exponent of the quality focal modulation.
    crosskd.CLS_BETA = 1.0
    crosskd.BOX_WEIGHT = 1.0
    # Loss between decoded boxes: "giou" or "iou" (the log form).
    crosskd.BOX_LOSS = "giou"
    crosskd.SCHEDULE = []

    # PKD (NeurIPS 2022): Pearson correlation between FPN maps.
    pkd = distill.PKD = CN()
    pkd.WEIGHT = 2.0
    # Student features to imitate; () takes all whose stride the teacher has too.
    pkd.IN_FEATURES = ()
    pkd.SCHEDULE = []

    # Feature imitation on FPN maps through 1x1 adapters (FitNet on detectors).
    imitation = distill.IMITATION = CN()
    imitation.WEIGHT = 1.0
    imitation.IN_FEATURES = ()
    imitation.SCHEDULE = []
