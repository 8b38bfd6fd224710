"""Runs of train_net.py on tiny models: configs, the process that runs them, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECORDER = Path(__file__).with_name("recorder.py")
# Without a GPU, so that every machine runs the same: processes talk through gloo.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

TINY = {
    "VERSION": 2,
    "MODEL": {
        "DEVICE": "cpu",
        "META_ARCHITECTURE": "RetinaNet",
        "WEIGHTS": "",
        "BACKBONE": {"NAME": "build_narrow_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 18,
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "NORM": "BN",
            "OUT_FEATURES": ["res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 32, "NORM": "GN"},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32]], "ASPECT_RATIOS": [[1.0]]},
        "RETINANET": {
            "NUM_CLASSES": 2, "IN_FEATURES": ["p3", "p4", "p5"], "NUM_CONVS": 1, "NORM": "GN",
            "SCORE_THRESH_TEST": 0.0,
        },
    },
    "INPUT": {"MIN_SIZE_TRAIN": [32, 40, 48], "MAX_SIZE_TRAIN": 64, "MIN_SIZE_TEST": 40, "MAX_SIZE_TEST": 64},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {
        "OPTIMIZER": "AdamW", "IMS_PER_BATCH": 2, "BASE_LR": 0.001, "MAX_ITER": 8, "WARMUP_ITERS": 2,
        "CHECKPOINT_PERIOD": 3,
    },
    "SEED": 3,
}
QUIET = {"DATASETS": {"TEST": []}}
FASTER_RCNN = {
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32]]},
        "RPN": {"IN_FEATURES": ["p3", "p4", "p5"], "BATCH_SIZE_PER_IMAGE": 16, "POST_NMS_TOPK_TRAIN": 50},
        "ROI_HEADS": {
            "NAME": "StandardROIHeads", "IN_FEATURES": ["p3", "p4", "p5"], "NUM_CLASSES": 2,
            "BATCH_SIZE_PER_IMAGE": 8, "SCORE_THRESH_TEST": 0.0,
        },
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
    }
}
# Of a student without a running normaliser, and a dense assistant with one.
TF_HEAD = {
    "MODEL": {
        "META_ARCHITECTURE": "Distiller",
        "GFL": {"NUM_CLASSES": 2, "IN_FEATURES": ["p3", "p4", "p5"], "NUM_CONVS": 1},
        "RPN": {"POST_NMS_TOPK_TRAIN": 50},
        "ROI_HEADS": FASTER_RCNN["MODEL"]["ROI_HEADS"],
        "ROI_BOX_HEAD": FASTER_RCNN["MODEL"]["ROI_BOX_HEAD"],
        "DISTILL": {
            "STUDENT": "GFL",
            "METHODS": ["TFHEAD"],
            "TF_HEAD": {
                "DENSE_ASSISTANT": "RetinaNet",
                "ASSIST_SCHEDULE": [["Warmup", 4]],
                "CROSS_SCHEDULE": [["Warmup", 4], ["EarlyStop", 6]],
            },
        },
    }
}


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    """A config with the values of all, those of later ones first."""
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def write_config(path: Path, *configs: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(merged(*configs)))))
    return path


def distiller(teacher_config: Path, teacher_weights: Path, *methods: str) -> dict[str, Any]:
    teacher = {"CONFIG_FILE": str(teacher_config), "WEIGHTS": str(teacher_weights)}
    taps = {"CLS_TAP": 1, "BOX_TAP": 1}
    distill = {"STUDENT": "RetinaNet", "METHODS": list(methods), "TEACHER": teacher, "CROSSKD": taps}
    return {"MODEL": {"META_ARCHITECTURE": "Distiller", "DISTILL": distill}}


@dataclass
class Outcome:
    """How the processes of a run ended; the streams are those of all of them."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        assert len(set(self.codes)) == 1, self
        return self.codes[0]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def succeeded(self) -> Outcome:
        assert set(self.codes) == {0}, f"{self.codes}\n{self.stdout[-3000:]}\n{self.stderr[-6000:]}"
        return self


class ForkServer:
    """Starts ``train_net.py`` in forks of a process that has imported torch; see forkserver.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        script = Path(__file__).with_name("forkserver.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=ENVIRONMENT,
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(
        self, *arguments: Any, script: Path = ROOT / "train_net.py", processes: int = 1, **environment: str
    ) -> Outcome:
        """Run a script to its end."""
        return self.wait(self.start(*arguments, script=script, processes=processes, **environment))

    def start(
        self, *arguments: Any, script: Path = ROOT / "train_net.py", processes: int = 1, **environment: str
    ) -> list[dict[str, Any]]:
        """Start a script in the project's folder; several processes get the variables that torchrun sets."""
        started = []
        port = free_port()
        for rank in range(processes):
            self._number += 1
            if processes > 1:
                environment.update(
                    TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    RANK=str(rank), LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                )
            streams = {name: str(self._folder / f"{self._number}.{name}") for name in ("stdout", "stderr")}
            argv = [str(script), *map(str, arguments)]
            pid = self._ask(argv=argv, cwd=str(ROOT), environment=environment, **streams)
            started.append({"pid": pid, **streams})
        return started

    def signal(self, started: dict[str, Any], number: int, *, group: bool = False) -> None:
        """Send a signal to a process, or to all of its group as a terminal does."""
        self._ask(kill=started["pid"], signal=int(number), group=group)

    def wait(self, started: Sequence[dict[str, Any]], timeout: float = 120) -> Outcome:
        codes = [self._ask(wait=process["pid"], timeout=timeout) for process in started]
        texts = {
            name: "".join(Path(process[name]).read_text(errors="replace") for process in started)
            for name in ("stdout", "stderr")
        }
        return Outcome(codes, **texts)


def run_program(*command: Any, cwd: Path = ROOT, environment: dict[str, str] = ENVIRONMENT) -> Outcome:
    """Runs ``python *command`` with the Python of the tests."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=180,
    )
    return Outcome([done.returncode], done.stdout, done.stderr)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def losses(folder: Path) -> list[dict[str, float]]:
    """What recorder.py wrote, a dict for each iteration made, resumed ones included."""
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def wait_for_losses(folder: Path, timeout: float = 90) -> None:
    """Wait until a run with recorder.py has made its first iteration."""
    deadline = time.monotonic() + timeout
    while not (folder / "losses.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scalars(folder: Path) -> dict[str, float]:
    """The last value of everything in metrics.json."""
    values: dict[str, float] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values.update(json.loads(line))
    return values


def average_precision(outcome: Outcome) -> list[float]:
    """AP, AP50 and AP75 as an evaluation has printed them."""
    row = [line for line in outcome.stdout.splitlines() if "copypaste: " in line][-1]
    return [float(value) for value in row.rpartition("copypaste: ")[2].split(",")[:3]]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(found: Path, expected: Path, *, iterations: Sequence[int]) -> None:
    """Each recorded iteration has the losses of an uninterrupted run, and both end with equal checkpoints."""
    theirs, ours = losses(expected), losses(found)
    assert [row["iteration"] for row in theirs] == list(range(8))
    assert len({row["total_loss"] for row in theirs}) == 8
    assert [row["iteration"] for row in ours] == list(iterations)
    for row in ours:
        assert row == theirs[row["iteration"]]
    left, right = (checkpoint(folder / "model_final.pth") for folder in (found, expected))
    assert_equal(left["model"], right["model"])
    assert_equal(left.get("distill"), right.get("distill"))
    assert_equal(left.get("balance"), right.get("balance"))
    assert_equal(left["trainer"]["_trainer"], right["trainer"]["_trainer"])


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_equal(a, b)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right
