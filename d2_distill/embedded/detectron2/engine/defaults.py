"""The parts of a standard training run: arguments, setup, trainer."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from collections import OrderedDict
from typing import Any

import torch
from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from . import hooks
from .train_loop import TrainerBase


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that Detectron2's training scripts share; what is left over is ``opts``."""
    # Runs of different users on one machine should not meet at the same port.
    user = os.getuid() if hasattr(os, "getuid") else 0
    port = 49152 + user % 16384  # one of the dynamic ports
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML with the run's settings")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="test MODEL.WEIGHTS instead of training")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes, each with a GPU if there are any")
    parser.add_argument("--num-machines", type=int, default=1, help="how many machines take part")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--dist-url", default=f"tcp://127.0.0.1:{port}",
                        help="where the processes meet (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... that override the file's")
    return parser


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Create the output folder and loggers, log the environment, keep the config, seed everything."""
    rank = comm.get_rank()
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    logger.info(f"Process {rank} of {comm.get_world_size()}")
    logger.info("What runs here:\n" + collect_env_info())
    logger.info(f"Called with {args}")
    if getattr(args, "config_file", ""):
        with PathManager.open(args.config_file, "r") as f:
            logger.info(f"{args.config_file} says:\n{f.read()}")
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        with PathManager.open(path, "w") as f:
            f.write(cfg.dump())
        logger.info(f"All settings are kept in {path}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    # Evaluation meets images of every size: trying algorithms for each would cost more than it gains.
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


class DefaultTrainer(TrainerBase):
    """Training as the config says, once a subclass has built what is trained.

    Its constructor calls that of ``TrainerBase``, sets the attributes below and registers ``build_hooks()``;
    it also defines ``build_test_loader(cfg, dataset_name)`` and ``build_evaluator(cfg, dataset_name)``.

    Attributes:
        cfg, scheduler, checkpointer, start_iter, max_iter: of the run.
        _trainer: the ``SimpleTrainer`` that makes the steps.
        model, data_loader, optimizer: those of the step; ``model`` is wrapped by DDP where it is used.
    """

    def __init__(self, cfg: CfgNode) -> None:
        raise NotImplementedError("The embedded DefaultTrainer leaves building to a subclass's constructor.")

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in OUTPUT_DIR if there is one, else load MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        # Rank 0 decides: only its folder is sure to hold the checkpoints.
        if resume and comm.all_gather(self.checkpointer.has_checkpoint())[0]:
            self.start_iter = self.iter + 1  # the checkpoint's step is done

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Timer, schedule, checkpoints, evaluation, writers, in this order."""
        cfg = self.cfg

        def test_and_save_results():
            self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        on_main = comm.is_main_process()
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            # Before the evaluation, which may fail: the checkpoint is then there.
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD) if on_main else None,
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test_and_save_results),
            # Last, so that it writes what the others put.
            hooks.PeriodicWriter(self.build_writers()) if on_main else None,
        ]

    def build_writers(self) -> list[EventWriter]:
        """The console, ``metrics.json``, and TensorBoard if it is installed."""
        folder = self.cfg.OUTPUT_DIR
        PathManager.mkdirs(folder)
        writers = [CommonMetricPrinter(self.max_iter), JSONWriter(os.path.join(folder, "metrics.json"))]
        if importlib.util.find_spec("tensorboard") is not None:
            writers.append(TensorboardXWriter(folder))
        return writers

    def train(self):
        """Train up to ``SOLVER.MAX_ITER``.

        Returns:
            The last evaluation's results where TEST.EXPECTED_RESULTS asks to verify them, else None.
        """
        super().train(self.start_iter, self.max_iter)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            evaluation.verify_results(self.cfg, self._last_eval_results)
            return self._last_eval_results
        return None

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @property
    def model(self) -> torch.nn.Module:
        return self._trainer.model

    @property
    def data_loader(self):
        return self._trainer.data_loader

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trainer.optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
        """Evaluate on every dataset of DATASETS.TEST.

        Returns:
            Results by dataset; those of the only one directly. Empty on other than the main process.
        """
        results: dict[str, Any] = OrderedDict()
        for dataset_name in cfg.DATASETS.TEST:
            data_loader = cls.build_test_loader(cfg, dataset_name)
            evaluator = cls.build_evaluator(cfg, dataset_name)
            results[dataset_name] = evaluation.inference_on_dataset(model, data_loader, evaluator)
            if comm.is_main_process():
                logging.getLogger(__name__).info(f"Results on {dataset_name}:")
                evaluation.print_csv_format(results[dataset_name])
        return next(iter(results.values())) if len(results) == 1 else results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scale the schedule from SOLVER.REFERENCE_WORLD_SIZE to ``num_workers`` processes.

        Images per step and learning rate grow with the number of processes, numbers of steps shrink.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference in (0, num_workers):
            return cfg
        assert cfg.SOLVER.IMS_PER_BATCH % reference == 0, (
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of REFERENCE_WORLD_SIZE.")
        cfg, frozen = cfg.clone(), cfg.is_frozen()
        cfg.defrost()
        scale = num_workers / reference

        def fewer(steps: int) -> int:
            return int(round(steps / scale))

        solver = cfg.SOLVER
        solver.IMS_PER_BATCH = int(round(solver.IMS_PER_BATCH * scale))
        solver.BASE_LR *= scale
        for node, key in ((solver, "MAX_ITER"), (solver, "WARMUP_ITERS"), (solver, "CHECKPOINT_PERIOD"),
                          (cfg.TEST, "EVAL_PERIOD")):
            node[key] = fewer(node[key])
        solver.STEPS = tuple(fewer(step) for step in solver.STEPS)
        solver.REFERENCE_WORLD_SIZE = num_workers
        logging.getLogger(__name__).info(
            f"For {num_workers} instead of {reference} processes: {solver.IMS_PER_BATCH} images per step, "
            f"learning rate {solver.BASE_LR}, {solver.MAX_ITER} steps.")
        if frozen:
            cfg.freeze()
        return cfg
