"""The configuration keys that d2_distill adds to Detectron2's.

Keys of one method, detector or backbone stand in its own file, which registers them with :func:`extend_config`; here
are the others.
"""

from __future__ import annotations

from typing import Callable

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

AddConfig = Callable[[CN], None]

_EXTENSIONS: list[AddConfig] = []


def extend_config(add_config: AddConfig) -> AddConfig:
    """Function decorator: :func:`add_distill_config` also calls this function, which adds keys to the config it gets.

    Use it in files of this package, which ``import d2_distill`` imports. A user's own file has a function
    ``add_config`` without the decorator: configs that name the file in ``IMPORTS`` get its keys.
    """
    _EXTENSIONS.append(add_config)
    return add_config


def get_distill_cfg() -> CN:
    """Return Detectron2's default config with the keys of :func:`add_distill_config`."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


def add_distill_config(cfg: CN) -> None:
    """Add all keys of d2_distill, with their defaults, to a Detectron2 config."""
    # Python files of your own, relative to the working directory. They are imported before the rest of the config is
    # read, which can name whatever they register and set the keys that their add_config(cfg) adds; docs/own_method.md.
    cfg.IMPORTS = ()

    # User data sets, registered before anything is built; relative paths are below $DETECTRON2_DATASETS
    # (default: "datasets").
    # COCO format: rows of (name, json_file, image_root).
    cfg.DATASETS.COCO = ()
    # Pascal VOC folders: rows of (name, dirname, split, class_names, year); class_names () takes CLASSES below or, if
    # these are empty too, all names in the folder's Annotations, sorted.
    cfg.DATASETS.VOC = ()
    # Names of the detector's classes in the order of its outputs; they set its head's NUM_CLASSES. () takes those of
    # the first data set of TRAIN, else of TEST, whose class list is known; data sets with another list are refused. The
    # config.yaml of a run holds them.
    cfg.DATASETS.CLASSES = ()

    # "SGD" (Detectron2's) or "AdamW"; both take BASE_LR, WEIGHT_DECAY* and BIAS_LR_FACTOR.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm of all gradients together, not of each parameter's.
    # Compute each step of IMS_PER_BATCH images in that many equal parts, one after another, which needs less memory.
    # MAX_ITER and the like still count steps of the optimizer.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Keep that many periodic checkpoints, the newest; 0 for all. model_best.pth and model_final.pth always stay.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # End the run after that many evaluations in a row without a better AP on the first data set of DATASETS.TEST; 0 for
    # never. Needs TEST.EVAL_PERIOD.
    cfg.SOLVER.EARLY_STOPPING = CN()
    cfg.SOLVER.EARLY_STOPPING.PATIENCE = 0
    # Evaluate, and save in model_best.pth and model_final.pth, an exponential moving average of the student's weights.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Of each step; of the first steps less, see engine/averaging.py. 0.9998 averages about 5000 steps: take less
    # if the run has fewer than 20000.
    cfg.SOLVER.EMA.DECAY = 0.9998

    # With an EVAL_PERIOD, keep the student with the best AP on the first data set of DATASETS.TEST in model_best.pth.
    cfg.TEST.SAVE_BEST = True
    # "nms" (the detector's own) or, with one-stage detectors, "cluster_nms" or "cluster_diou_nms", with
    # "voting_" or "weighted_" in front for boxes that are voted on; see postprocess/cluster_nms.py.
    cfg.TEST.NMS = "nms"
    # Rules of Pascal VOC data sets: "devkit" (Detectron2's) or "openmmlab"; see evaluation/voc.py.
    cfg.TEST.VOC_CONVENTION = "devkit"

    # Batch norms of the backbone use their running statistics and do not update them, while weight and bias are
    # trained (OpenMMLab's norm_eval). For RESNETS.NORM "BN"; stages below FREEZE_AT are frozen altogether.
    cfg.MODEL.BACKBONE.FIXED_BN_STATISTICS = False

    _add_distiller_config(cfg)
    for add_config in _EXTENSIONS:
        add_config(cfg)


def _add_distiller_config(cfg: CN) -> None:
    # The keys of each method are in its file in d2_distill/methods/.
    # MODEL.META_ARCHITECTURE "Distiller" trains the detector that the usual keys describe, with a teacher.
    distill = cfg.MODEL.DISTILL = CN()
    # Meta-architecture of the student, e.g. "RetinaNet".
    distill.STUDENT = "RetinaNet"
    # Names of methods; their loss terms add up. train_net.py --list prints all of them. ("auto",) takes those that did
    # best for such a pair, see docs/choosing.md; the log tells which.
    distill.METHODS = ()
    # Weights of the methods' terms: "published", as configured; "auto", such that each term keeps its ratio of gradient
    # norms at the student's features to the detection loss, see methods/balance.py; "" is "auto" for METHODS ("auto",),
    # else "published".
    distill.BALANCE = ""
    # "auto": measure the gradients every N iterations, and more often in the first N.
    distill.BALANCE_PERIOD = 25
    # Take the methods' normalizers and statistics over the images of each process, as published code does. By default
    # they are those of all processes, so that several GPUs train as one with the whole batch.
    distill.NORMALIZE_PER_PROCESS = False
    # Dotted names of modules that are copied from the teacher into the student before training (HEAD's "weight
    # transfer"), e.g. ("head",), or "student name=teacher name". Shapes must agree; the copies stay trainable.
    distill.INHERIT = ()
    # Log the ratio of each term's gradient norm to the detection loss's every N iterations; 0 for never. See
    # docs/choosing.md.
    distill.GRADIENT_RATIO_PERIOD = 200

    distill.TEACHER = CN()
    # The teacher's own config file, as for any Detectron2 model, or a name of Detectron2's model zoo if installed.
    distill.TEACHER.CONFIG_FILE = ""
    # Checkpoint; "" takes MODEL.WEIGHTS of the teacher's config.
    distill.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: a flat list of keys and values.
    distill.TEACHER.OPTS = []
    # The teacher's classes are matched with the student's by name; its other classes are left out. Add entries
    # "student name=teacher name" for classes that the two call differently.
    distill.TEACHER.CLASS_ALIASES = ()
    # The teacher's batch norms use, and update, the statistics of each batch; for MSAD's published code only.
    distill.TEACHER.BATCH_STATISTICS = False
