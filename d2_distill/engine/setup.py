"""From command-line arguments to a checked config, a model, and an output folder of this run's own."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint.exact import TrainingCheckpointer, readable, require_file
from ..checkpoint.resuming import find_resumable
from ..checkpoint.torchvision import check_pretrained, is_address
from ..config.model_zoo import find_config
from ..config.named_teacher import name_teacher, resolve_run_folder
from ..config.pretrained import with_pretrained_inputs
from ..config.reading import read_config, use_available_device
from ..config.rules import check_config
from ..data.checks import check_datasets
from ..data.classes import check_outputs, dataset_classes, with_classes
from ..data.loaded import keep_only
from ..data.loader import check_batch
from ..data.own_sets import name_data
from ..data.registration import register_datasets
from ..data.sharing import main_process_first
from ..data.voc_files import forget_parsed_files
from ..detectors.building import DISTILLER, build_detector
from ..errors import UserError, sentence_of
from ..evaluation.augmented import check_augmentation
from ..evaluation.voc import voc_convention
from ..layers.memory_format import in_fast_layout
from ..teacher import read_teacher_config
from .accumulation import check_accumulation
from .averaging import check_averaging
from .early_stop import check_early_stopping
from .evaluate import load_detector
from .lock import lock_folder
from .logs import held_back, raise_when_full, silenced
from .output_dir import claim_output_dir, end_last_line
from .retention import check_retention
from .teacher_identity import require_same_teacher

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """Check the config, the data, the output folder and the model of a run; only then open folder and log.

    Returns:
        The config; the model to train, newly initialised, or with ``--eval-only`` the student with weights.

    Raises:
        UserError: before anything is written, if any of them cannot be used.
    """
    with held_back():
        cfg = main_process_first(lambda: _with_checked_data(args))
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
        if args.eval_only:
            # In the memory format of training, so that an evaluation repeats the run's own to the last digit.
            model = in_fast_layout(load_detector(cfg, resume=args.resume))
            run_cfg = _of_evaluation(cfg)
        else:
            _check_reference_world_size(cfg)
            _check_precision(cfg)
            for check in (check_accumulation, check_averaging, check_early_stopping, check_retention):
                check(cfg)
            claim_output_dir(cfg, resume=args.resume)
            model = _initialised(cfg, resume=args.resume)
            run_cfg = cfg
        if args.config_file:  # Detectron2 copies it into the log
            args.config_file = find_config(args.config_file, key="The config")
        # No process may write into the folder before all have looked into it.
        comm.synchronize()
        lock_folder(cfg.OUTPUT_DIR)
        if comm.is_main_process():
            end_last_line(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
        try:
            # The first two as default_setup does, which then finds them.
            setup_logger(run_cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fvcore")
            setup_logger(run_cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
            setup_logger(run_cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_distill")
            raise_when_full()
            default_setup(run_cfg, args)
        except OSError as error:
            raise UserError(f"OUTPUT_DIR: {sentence_of(error)}") from error
    return cfg, model


def _with_checked_data(args: argparse.Namespace) -> CfgNode:
    """Return the run's config, whose data sets are then registered and checked; nothing else is kept of any data set.

    Raises:
        UserError: a config or a data set cannot be used.
    """
    named = {option: getattr(args, option, ()) for option in ("train_data", "test_data", "teacher")}
    cfg = load_config(args.config_file, args.opts, trained=args.eval_only, **named)
    used = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    register_datasets(cfg, names=(None, *used))  # None: a row whose name is malformed
    voc_convention(cfg.TEST.VOC_CONVENTION)
    check_augmentation(cfg)
    check_datasets(cfg, train=not args.eval_only)
    if not args.eval_only:
        check_batch(cfg)
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER and cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE and not args.eval_only:
        dataset_classes(read_teacher_config(cfg), register=True)  # so that no other process reads the teacher's data
    forget_parsed_files()
    keep_only(used)
    return with_classes(cfg)  # some data sets tell their classes only when they are loaded


def load_config(
    config_file: str,
    opts: Sequence[str],
    *,
    train_data: Sequence[Sequence[str]] = (),
    test_data: Sequence[Sequence[str]] = (),
    teacher: Sequence[str] = (),
    trained: bool = True,
) -> CfgNode:
    """The defaults, overridden by a config file or one of Detectron2's model zoo, overridden by a flat list of keys and
    values; frozen.

    The detector has the classes of its data, see :func:`.data.classes.with_classes`, and sees its images as ImageNet
    weights of torchvision do if it starts from them, see :func:`.config.pretrained.with_pretrained_inputs`.

    Args:
        train_data, test_data: data sets in the place of those that the config names, see :func:`.data.own_sets.name_data`.
        teacher: the teacher, see :func:`.config.named_teacher.name_teacher`.
        trained: whether ``MODEL.WEIGHTS`` of ``opts`` is the result of a training with the config file, not its start.

    Raises:
        UserError: the file is missing, or a key or the type of a value is wrong, or there is no such data.
    """
    source = f"The config ({config_file or 'the default config'} with the command line's overrides)"
    if config_file:
        config_file = find_config(config_file, key="The config")
    cfg = read_config(config_file, opts, source=source)
    check_config(cfg, source=source)
    cfg = with_pretrained_inputs(cfg, config_file=config_file, opts=opts, trained=trained)
    use_available_device(cfg)
    name_data(cfg, train_data, test_data)
    name_teacher(cfg, teacher)
    resolve_run_folder(cfg)
    cfg.freeze()
    return with_classes(cfg)


def _check_reference_world_size(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: the trainer could not scale the schedule to the number of processes.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, no multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}. Batch, BASE_LR, WARMUP_ITERS, STEPS and MAX_ITER are those of that many GPUs and "
            "are scaled to the number there is; leave them as they are, or set REFERENCE_WORLD_SIZE to 0 and "
            "change all of them."
        )


def _check_precision(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: mixed precision is wanted, which Detectron2 trains on GPUs only.
    """
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise UserError(
            "SOLVER.AMP.ENABLED is True, but the model is trained on the CPU, where there is no mixed precision; "
            "set it to False or MODEL.DEVICE to cuda."
        )


def _initialised(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model before the trainer loads the last checkpoint, or else ``MODEL.WEIGHTS``."""
    resumes = find_resumable(cfg.OUTPUT_DIR) if resume else ""
    if cfg.MODEL.WEIGHTS and not resumes:
        require_file(cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS")
    distils = cfg.MODEL.META_ARCHITECTURE == DISTILLER
    model = build_model(cfg) if distils else build_detector(cfg)
    student = model.student if distils else model
    check_outputs(cfg, student)
    if cfg.MODEL.WEIGHTS and not resumes:
        if is_address(cfg.MODEL.WEIGHTS):
            _check_pretrained(cfg, student)
        else:
            _check_start(cfg.MODEL.WEIGHTS, student)
    if not distils:
        return model
    if not cfg.MODEL.DISTILL.METHODS and not cfg.MODEL.DISTILL.INHERIT:
        raise UserError(
            'MODEL.DISTILL.METHODS is empty, so nothing would be distilled; name methods, such as "auto", or set '
            f"MODEL.META_ARCHITECTURE to {cfg.MODEL.DISTILL.STUDENT} to train the plain student."
        )
    model.prepare_training()
    if cfg.MODEL.DISTILL.METHODS and not model.methods:
        logger.warning("All weights of MODEL.DISTILL.METHODS are 0, so nothing is distilled: this trains a plain student.")
    if resumes and model.teacher is not None:
        require_same_teacher(resumes, model.teacher)
    return model


def _check_start(weights: str, student: nn.Module) -> None:
    """Load weights as the trainer will, which then logs what fits.

    Raises:
        UserError: they cannot be read, or nothing of them fits.
    """
    with readable(weights, key="MODEL.WEIGHTS"), silenced():
        TrainingCheckpointer(student).load(weights, checkpointables=[])


def _check_pretrained(cfg: CfgNode, student: nn.Module) -> None:
    """Let one process of each machine download and check the weights that the trainers of all load.

    Raises:
        UserError: in all processes, see :func:`.checkpoint.torchvision.check_pretrained`.
    """
    refusal = None
    if comm.get_local_rank() == 0:
        try:
            check_pretrained(student, cfg.MODEL.WEIGHTS)
        except UserError as error:
            refusal = str(error)
    for found in comm.all_gather(refusal):
        if found is not None:
            raise UserError(found)


def _of_evaluation(cfg: CfgNode) -> CfgNode:
    """An evaluation keeps its log and config in a subfolder; those of the run are not its to overwrite."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference")
    return cfg
