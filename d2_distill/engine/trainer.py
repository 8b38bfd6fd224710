"""The trainer of train_net.py."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.exact import TrainingCheckpointer, readable
from ..checkpoint.torchvision import is_address, load_pretrained
from ..config.pretrained import require_corrected
from ..data.loader import build_test_loader, build_train_loader
from ..data.mapper import CheckedDatasetMapper
from ..distiller import Distiller
from ..errors import UserError
from ..evaluation.coco import CheckedCOCOEvaluator
from ..evaluation.known_classes import KnownClasses
from ..evaluation.voc import VOCEvaluator
from ..layers.memory_format import in_fast_layout
from .hooks import LossNormalizers, SeedEveryStep, StopOnSignal, TrainingClock
from .optimizer import build_optimizer


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer``, for distilled and plain detectors, whose runs resume exactly.

    Differences: checkpoints hold the student under ``model`` and adapters under ``distill``; the training
    loader starts at the first iteration of a resumed run; a signal ends a run with a checkpoint; DDP works
    between processes on the CPU.
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
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._seeding = SeedEveryStep(cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())
        self._batch_files: list[str] = []
        model.register_forward_pre_hook(self._remember_batch)
        # The loader is built when the first iteration is known.
        self._trainer = trainer_class(_distributed(model), None, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO or Pascal VOC protocol, by the data set's ``evaluator_type``."""
        if MetadataCatalog.get(dataset_name).get("evaluator_type", "coco") == "pascal_voc":
            evaluator = VOCEvaluator(dataset_name, cfg.TEST.VOC_CONVENTION)
        else:
            evaluator = CheckedCOCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
        return KnownClasses(evaluator, dataset_name)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name, CheckedDatasetMapper(cfg, is_train=False))

    def build_hooks(self) -> list[HookBase]:
        normalizers = LossNormalizers(self.model, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        stop = StopOnSignal(normalizers)
        return [self._seeding, normalizers, TrainingClock(), *super().build_hooks(), stop]

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
        # A scripted function (the focal loss) rounds differently once it is optimised, after its first calls
        # in a process. On GPUs, where runs do not repeat to the bit anyway, that saves much memory.
        with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"):
            return super().train()

    def run_step(self) -> None:
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
            self._batch_files = [inputs.get("file_name", "?") for inputs in args[0]]


def build_checkpointer(model: nn.Module, save_dir: str, **checkpointables: Any) -> TrainingCheckpointer:
    """Checkpointer of a plain detector, or of a distiller: the student as ``model``, adapters as ``distill``.

    So that every checkpoint loads into the plain student.
    """
    if isinstance(model, Distiller):
        if any(True for _ in model.methods.parameters()):
            checkpointables["distill"] = model.methods
        model = model.student
    return TrainingCheckpointer(model, save_dir, **checkpointables)


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
