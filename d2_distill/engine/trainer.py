"""The trainer of train_net.py."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.exact import TrainingCheckpointer, readable
from ..checkpoint.resuming import trained_until
from ..checkpoint.torchvision import is_address, load_pretrained
from ..config.pretrained import require_corrected
from ..data.loader import build_test_loader, build_train_loader
from ..data.mapper import CheckedDatasetMapper
from ..distiller import Distiller
from ..errors import UserError
from ..evaluation.augmented import SUFFIX, evaluate_augmented
from ..evaluation.coco import CheckedCOCOEvaluator
from ..evaluation.known_classes import KnownClasses
from ..evaluation.voc import VOCEvaluator
from ..layers.memory_format import in_fast_layout
from .accumulation import build_stepper
from .averaging import AverageWeights, AveragingCheckpointer, WeightAverage
from .best import BestCheckpoint
from .early_stop import EarlyStopping, StoppableLoop
from .evaluation import PeriodicEvaluation
from .hooks import FINAL, LossNormalizers, RelayAfterBackward, SeedEveryStep, StopOnSignal, TrainingClock
from .optimizer import build_optimizer
from .retention import RecentCheckpoints
from .run_summary import log_summary
from .teacher_identity import ENTRY, TeacherIdentity


class Trainer(DefaultTrainer, StoppableLoop):
    """Detectron2's ``DefaultTrainer``, for distilled and plain detectors, whose runs resume exactly.

    Differences: checkpoints hold the student under ``model`` and adapters under ``distill``; the training
    loader starts at the first iteration of a resumed run; a signal ends a run with a checkpoint; DDP works
    between processes on the CPU. docs/training.md describes what else the config can ask for.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        # Not DefaultTrainer's constructor: its DDP wrapper and its checkpointer cannot be exchanged there.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        if isinstance(model, Distiller):
            model.prepare_training()  # before the optimizer, which is to train the adapters
        model = in_fast_layout(model)
        optimizer = self.build_optimizer(cfg, model)
        self._seeding = SeedEveryStep(cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())
        self._batch_files: list[str] = []
        model.register_forward_pre_hook(self._remember_batch)
        # The loader is built when the first iteration is known.
        self._trainer = build_stepper(cfg, _distributed(model), optimizer)
        self._trainer.register_hooks([RelayAfterBackward(weakref.proxy(self))])
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        ema = cfg.SOLVER.EMA
        self._average = WeightAverage(student_of(model), ema.DECAY) if ema.ENABLED else None
        self.checkpointer = build_checkpointer(
            model, cfg.OUTPUT_DIR, average=self._average, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, *, folder: str = "inference") -> DatasetEvaluator:
        """COCO or Pascal VOC protocol, by the data set's ``evaluator_type``.

        Args:
            folder: of what COCO's evaluator writes, in ``OUTPUT_DIR``.
        """
        if MetadataCatalog.get(dataset_name).get("evaluator_type", "coco") == "pascal_voc":
            evaluator = VOCEvaluator(dataset_name, cfg.TEST.VOC_CONVENTION)
        else:
            evaluator = CheckedCOCOEvaluator(
                dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, folder), max_detections=cfg.TEST.DETECTIONS_PER_IMAGE
            )
        return KnownClasses(evaluator, dataset_name)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name, CheckedDatasetMapper(cfg, is_train=False))

    @classmethod
    def test_augmented(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Return :meth:`test` with test-time augmentation, nothing unless ``TEST.AUG.ENABLED``."""
        if not cfg.TEST.AUG.ENABLED:
            return {}
        evaluator = functools.partial(cls.build_evaluator, folder=f"inference{SUFFIX}")
        return evaluate_augmented(cfg, model, build_loader=build_test_loader, build_evaluator=evaluator)

    def build_hooks(self) -> list[HookBase]:
        normalizers = LossNormalizers(self.model, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        average = None if self._average is None else AverageWeights(self._average)
        hooks: list[HookBase | None] = [self._seeding, normalizers, average, TrainingClock()]
        for hook in super().build_hooks():
            if isinstance(hook, EvalHook):
                hooks += self._build_evaluation(normalizers)
            elif isinstance(hook, PeriodicCheckpointer) and self.cfg.SOLVER.CHECKPOINTS_KEPT:
                solver = self.cfg.SOLVER
                hooks.append(RecentCheckpoints(
                    self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=solver.CHECKPOINTS_KEPT
                ))
            else:
                hooks.append(hook)
        return [*hooks, StopOnSignal(normalizers)]

    def _build_evaluation(self, normalizers: LossNormalizers) -> list[HookBase]:
        """The hooks that evaluate and that follow from it, in the order in which training must call them."""
        cfg = self.cfg
        first = next(iter(cfg.DATASETS.TEST), "")
        saves_best = cfg.TEST.SAVE_BEST and cfg.TEST.EVAL_PERIOD > 0
        best = [BestCheckpoint(self.checkpointer.model, cfg.OUTPUT_DIR, first)] if saves_best else []
        patience = cfg.SOLVER.EARLY_STOPPING.PATIENCE
        stopping = [EarlyStopping(patience, first, normalizers)] if patience else []
        weights = contextlib.nullcontext if self._average is None else self._average.in_place
        evaluation = PeriodicEvaluation(cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST, [*best, *stopping], weights)
        return [*best, evaluation, *stopping]

    def evaluate(self) -> dict[str, Any]:
        """Return :meth:`test` of the model as it is, and after the last step also :meth:`test_augmented`."""
        results = self.test(self.cfg, self.model)
        if self.iter >= self.max_iter:
            results = {**results, **self.test_augmented(self.cfg, self.model)}
        self._last_eval_results = results  # DefaultTrainer verifies them in the end
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        resumes = resume and self.checkpointer.has_checkpoint()
        weights = self.checkpointer.get_checkpoint_file() if resumes else self.cfg.MODEL.WEIGHTS
        model = getattr(self.model, "module", self.model)
        with readable(weights, key="OUTPUT_DIR" if resumes else "MODEL.WEIGHTS"):
            if is_address(weights):
                require_corrected(self.cfg)
                student = model.student if isinstance(model, Distiller) else model
                load_pretrained(student, weights, input_format=self.cfg.INPUT.FORMAT)
            else:
                super().resume_or_load(resume=resume)
        if isinstance(model, Distiller) and weights and not resumes:
            model.inherit()

    def train(self) -> Any:
        self._trainer.data_loader = build_train_loader(
            self.cfg, start_iter=self.start_iter, seed=self._seeding.seed
        )
        if comm.is_main_process():
            model = getattr(self.model, "module", self.model)
            log_summary(self.cfg, model, images=len(self._trainer.data_loader.dataset))
        if self.start_iter >= self.max_iter:
            self._end_again()
        # A scripted function (the focal loss) rounds differently once it is optimised, after its first calls
        # in a process. On GPUs, where runs do not repeat to the bit anyway, that saves much memory.
        with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"):
            return super().train()

    def _end_again(self) -> None:
        """Write the last checkpoint of a run that was killed after its last step."""
        path = Path(self.cfg.OUTPUT_DIR) / f"{FINAL}.pth"
        if comm.is_main_process() and trained_until(path) != self.start_iter - 1:
            self.checkpointer.save(FINAL, iteration=self.start_iter - 1)

    def run_step(self) -> None:
        self._batch_files.clear()
        try:
            super().run_step()
        except FloatingPointError as error:
            raise UserError(
                f"The loss is not finite at iteration {self.iter} ({_reason(error)}), on the images "
                f"{', '.join(self._batch_files)}; lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set "
                "SOLVER.CLIP_GRADIENTS, and train again in another OUTPUT_DIR."
            ) from error

    def _remember_batch(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self._batch_files += [inputs.get("file_name", "?") for inputs in args[0]]


def build_checkpointer(
    model: nn.Module, save_dir: str, *, average: WeightAverage | None = None, **checkpointables: Any
) -> TrainingCheckpointer:
    """Checkpointer of a plain detector, or of a distiller: the student as ``model``, adapters as ``distill``.

    So that every checkpoint loads into the plain student.
    """
    if isinstance(model, Distiller):
        if any(True for _ in model.methods.parameters()):
            checkpointables["distill"] = model.methods
        if model.balance is not None:
            checkpointables["balance"] = model.balance
        if model.teacher is not None:
            checkpointables[ENTRY] = TeacherIdentity(model.teacher)
    if average is not None:
        return AveragingCheckpointer(student_of(model), save_dir, average=average, **checkpointables)
    return TrainingCheckpointer(student_of(model), save_dir, **checkpointables)


def student_of(model: nn.Module) -> nn.Module:
    """Return the detector that is trained for use: a distiller's student, or the model itself."""
    return model.student if isinstance(model, Distiller) else model


def _distributed(model: nn.Module) -> nn.Module:
    if comm.get_world_size() == 1:
        return model
    # DDP accepts device ids of GPUs only.
    on_cpu = next(model.parameters()).device.type == "cpu"
    device_ids: list[int] | None = None if on_cpu else [comm.get_local_rank()]
    with warnings.catch_warnings():
        # It is about another name of the last argument, which older versions of torch do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
