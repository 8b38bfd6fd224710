"""Training loop, default trainer and launcher, on a model of one number."""

from __future__ import annotations

import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from .toy_training import Regression, simple_trainer


class _Recorder(HookBase):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def _record(self, moment):
        self.log.append((self.name, moment, self.trainer.iter, self.trainer.storage.iter))

    def before_train(self):
        self._record("before_train")

    def before_step(self):
        self._record("before_step")

    def after_backward(self):
        self._record("after_backward")

    def after_step(self):
        self._record("after_step")

    def after_train(self):
        self._record("after_train")


def test_hooks_are_called_in_order_with_the_right_iteration():
    log = []
    trainer = simple_trainer()
    trainer.register_hooks([_Recorder("a", log), None, _Recorder("b", log)])
    trainer.train(4, 6)
    moments = [("before_train", 4)]
    moments += [(moment, step) for step in (4, 5) for moment in ("before_step", "after_backward", "after_step")]
    moments += [("after_train", 6)]
    assert log == [(name, moment, step, step) for moment, step in moments for name in "ab"]
    assert trainer.iter == trainer.max_iter == 6 and trainer.start_iter == 4


def test_hooks_do_not_keep_the_trainer_alive():
    trainer = simple_trainer()
    hook = _Recorder("a", [])
    trainer.register_hooks([hook])
    del trainer
    with pytest.raises(ReferenceError):
        hook.trainer.iter


def test_an_exception_passes_through_and_after_train_still_runs():
    log = []

    class Failing(TrainerBase):
        def run_step(self):
            raise RuntimeError("broken step")

    trainer = Failing()
    trainer.register_hooks([_Recorder("a", log)])
    with pytest.raises(RuntimeError, match="broken step"):
        trainer.train(0, 3)
    assert [moment for _, moment, _, _ in log] == ["before_train", "before_step", "after_train"]


def test_a_step_is_plain_sgd_and_writes_its_losses():
    trainer = simple_trainer(data=[1.0, 2.0])
    trainer.train(0, 2)
    assert trainer.model.weight.item() == pytest.approx(1 - 0.1 * 3 - 0.1 * (0.9 * 3 + 6))
    latest = trainer.storage.latest()
    weight = 1 - 0.1 * 3
    assert latest["loss_a"] == (pytest.approx(2 * weight), 1)
    assert latest["loss_b"] == (pytest.approx(4 * weight), 1)
    assert latest["total_loss"] == (pytest.approx(6 * weight), 1)
    assert latest["data_time"][0] == latest["rank_data_time"][0] >= 0


def test_a_bare_loss_is_the_total_loss():
    class Bare(Regression):
        def forward(self, x):
            return self.weight * x

    trainer = simple_trainer(Bare())
    trainer.train(0, 1)
    latest = trainer.storage.latest()
    assert latest["total_loss"][0] == 1.0
    assert set(latest) == {"total_loss", "data_time", "rank_data_time"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    trainer = simple_trainer(data=[value])
    with pytest.raises(FloatingPointError, match="iteration=0"):
        trainer.train(0, 1)
    assert trainer.model.weight.item() == 1.0


def test_a_model_in_eval_mode_is_refused():
    trainer = simple_trainer()
    assert trainer.model.training
    trainer.model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(0, 1)


class _ScheduledTrainer(SimpleTrainer):
    """A trainer whose whole state is in its checkpoints, as DefaultTrainer's is."""

    def __init__(self, folder):
        model = Regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        super().__init__(model, (float(1 + step % 3) for step in range(100)), optimizer)
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.1)
        self.checkpointer = DetectionCheckpointer(model, str(folder), trainer=self)
        self.register_hooks([hooks.LRScheduler(), hooks.PeriodicCheckpointer(self.checkpointer, 3)])

    def skip_data(self, steps):
        for _ in range(steps):
            next(self._data_loader_iter)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = _ScheduledTrainer(tmp_path / "whole")
    whole.train(0, 8)

    _ScheduledTrainer(tmp_path / "parts").train(0, 3)
    resumed = _ScheduledTrainer(tmp_path / "parts")
    resumed.checkpointer.resume_or_load("", resume=True)
    assert resumed.iter == 2 and resumed.scheduler.last_epoch == 3
    resumed.skip_data(3)
    resumed.train(3, 8)

    assert resumed.model.weight.item() == whole.model.weight.item()
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    for name in ("lr", "total_loss"):
        assert resumed.storage.history(name).values() == whole.storage.history(name).values()[3:]
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_final.pth"
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {"model_0000002.pth", "model_0000005.pth", "model_final.pth", "last_checkpoint"}


def test_a_state_without_its_hook_is_ignored():
    trainer = simple_trainer()
    state = trainer.state_dict()
    assert set(state) == {"iteration", "optimizer"}
    trainer.load_state_dict({**state, "iteration": 5, "hooks": {"LRScheduler": {}}})
    assert trainer.iter == 5


class _Evaluator(DatasetEvaluator):
    def reset(self):
        self.outputs = []

    def process(self, inputs, outputs):
        self.outputs.extend(outputs)

    def evaluate(self):
        return {"bbox": {"AP": float(sum(self.outputs))}}


class _ToyDetector(Regression):
    def forward(self, x):
        return super().forward(float(len(x))) if self.training else [self.weight.item()] * len(x)


class _ToyTrainer(DefaultTrainer):
    """A DefaultTrainer with a constructor of its own, as the project's."""

    def __init__(self, cfg):
        super(DefaultTrainer, self).__init__()
        self.cfg = cfg
        model = _ToyDetector()
        optimizer = build_optimizer(cfg, model)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, [[0] * cfg.SOLVER.IMS_PER_BATCH] * 100, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[0]] * 7

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return _Evaluator()


def _toy_cfg(folder, *overrides):
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4,
        "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2,
        "DATASETS.TEST", ("toy",), "SEED", 3, *overrides,
    ])
    return cfg


def test_default_trainer_writes_what_it_evaluates(tmp_path):
    trainer = _ToyTrainer(_toy_cfg(tmp_path))
    trainer.resume_or_load(resume=False)
    assert isinstance(trainer.model, _ToyDetector) and len(trainer.data_loader) == 100
    assert trainer.optimizer.param_groups[0]["params"][0] is trainer.model.weight
    assert trainer.train() is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 4
    assert lines[-1]["bbox/AP"] == pytest.approx(7 * trainer.model.weight.item())


def test_default_trainer_returns_verified_results(tmp_path):
    cfg = _toy_cfg(tmp_path, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 7.0, 1.0]], "SOLVER.BASE_LR", 1e-6)
    assert _ToyTrainer(cfg).train()["bbox"]["AP"] == pytest.approx(7.0, abs=1e-3)
    cfg = _toy_cfg(tmp_path, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 9.0, 1.0]], "SOLVER.BASE_LR", 1e-6)
    with pytest.raises(SystemExit):
        _ToyTrainer(cfg).train()


def test_loading_weights_does_not_resume(tmp_path):
    _ToyTrainer(_toy_cfg(tmp_path)).train()
    weights = str(tmp_path / "model_0000001.pth")
    trainer = _ToyTrainer(_toy_cfg(tmp_path, "MODEL.WEIGHTS", weights))
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0 and not trainer.optimizer.state
    assert trainer.model.weight.item() == torch.load(weights)["model"]["weight"].item()
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4 and trainer.optimizer.state


def test_results_by_dataset(tmp_path):
    cfg = _toy_cfg(tmp_path, "DATASETS.TEST", ("first", "second"))
    results = _ToyTrainer.test(cfg, _ToyDetector().eval())
    assert results == {"first": {"bbox": {"AP": 7.0}}, "second": {"bbox": {"AP": 7.0}}}
    assert _ToyTrainer.test(_toy_cfg(tmp_path), _ToyDetector().eval()) == {"bbox": {"AP": 7.0}}


def test_schedule_scales_with_the_number_of_processes(tmp_path):
    cfg = _toy_cfg(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 4,
                   "SOLVER.BASE_LR", 0.1, "SOLVER.MAX_ITER", 40, "SOLVER.STEPS", (30, 35),
                   "SOLVER.WARMUP_ITERS", 10, "TEST.EVAL_PERIOD", 20, "SOLVER.CHECKPOINT_PERIOD", 10)
    cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 4)
    assert scaled.is_frozen() and cfg.SOLVER.MAX_ITER == 40
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (8, 0.2, 20)
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == ((15, 18), 5, 5)
    assert scaled.TEST.EVAL_PERIOD == 10 and solver.REFERENCE_WORLD_SIZE == 4
    assert DefaultTrainer.auto_scale_workers(cfg, 2) is cfg


@pytest.mark.skipif(torch.cuda.is_available(), reason="mixed precision works on CUDA")
def test_mixed_precision_needs_cuda(tmp_path):
    with pytest.raises(AssertionError):
        _ToyTrainer(_toy_cfg(tmp_path, "SOLVER.AMP.ENABLED", True)).train()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_mixed_precision_step(tmp_path):
    trainer = _ToyTrainer(_toy_cfg(tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.BASE_LR", 0.1))
    trainer.model.cuda()
    trainer.train()
    assert trainer.model.weight.item() < 1
    assert "grad_scaler" in trainer.state_dict()["_trainer"]


def test_command_line():
    args = default_argument_parser().parse_args(
        ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "SOLVER.MAX_ITER", "5"])
    assert (args.config_file, args.num_gpus, args.resume, args.eval_only) == ("a.yaml", 2, True, False)
    assert (args.num_machines, args.machine_rank, args.opts) == (1, 0, ["SOLVER.MAX_ITER", "5"])
    host, port = args.dist_url.rsplit(":", 1)
    assert host == "tcp://127.0.0.1" and 1024 < int(port) < 65536


def test_setup_keeps_the_config_and_seeds(tmp_path):
    cfg = _toy_cfg(tmp_path / "new", "SEED", 11)
    default_setup(cfg, SimpleNamespace(eval_only=True))
    first = torch.rand(1)
    default_setup(cfg, SimpleNamespace(eval_only=True))
    assert torch.equal(torch.rand(1), first)
    kept = get_cfg()
    kept.merge_from_file(str(tmp_path / "new" / "config.yaml"))
    assert kept.SOLVER == cfg.SOLVER and kept.OUTPUT_DIR == cfg.OUTPUT_DIR
    assert "eval_only=True" in (tmp_path / "new" / "log.txt").read_text()


def test_one_process_is_launched_in_place():
    calls = []
    launch(lambda *args: calls.append(args), 1, args=(1, "a"))
    assert calls == [(1, "a")]


def test_several_processes_need_an_address():
    with pytest.raises((ValueError, AssertionError)):
        launch(print, 2, num_machines=2, dist_url="auto")


def _train_in_two_processes(folder: str) -> None:
    """Rank r trains on the number 1 + 2r: both together are one process that trains on 2."""
    rank, model = comm.get_rank(), DistributedDataParallel(Regression())
    trainer = simple_trainer(model, data=[1.0 + 2 * rank] * 3)
    trainer.train(0, 2)
    scalars = {name: value for name, (value, _) in trainer.storage.latest().items()}
    torch.save({"weight": model.module.weight.item(), "scalars": scalars, "rank": rank,
                "local_rank": comm.get_local_rank()}, f"{folder}/rank{rank}.pth")


def test_two_processes_on_the_cpu(tmp_path):
    launch(_train_in_two_processes, 2, dist_url="auto", args=(str(tmp_path),))
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    single = simple_trainer(data=[2.0] * 3)
    single.train(0, 2)
    assert first["weight"] == second["weight"] == pytest.approx(single.model.weight.item())
    assert first["scalars"]["loss_a"] == pytest.approx(single.storage.latest()["loss_a"][0])
    assert first["scalars"]["total_loss"] == pytest.approx(single.storage.latest()["total_loss"][0])
    assert first["scalars"]["data_time"] >= first["scalars"]["rank_data_time"]
    assert set(second["scalars"]) == {"rank_data_time"}
    assert (first["local_rank"], second["local_rank"]) == (0, 1)
