"""Guards the output folder of a run against another run."""

from __future__ import annotations

import os

import yaml
from detectron2.utils import comm

from ..errors import UserError

_RUN_FILES = ("last_checkpoint", "metrics.json")
# Keys that may change when a run is resumed: where and how long it trains, how it is evaluated, and what it logs.
_FREE_KEYS = {
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "MODEL.DEVICE",
    "MODEL.DISTILL.GRADIENT_RATIO_PERIOD",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.EARLY_STOPPING.PATIENCE",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
}
_FREE_PREFIX = "TEST."
_ABSENT = "(absent)"
_MAX_NAMED = 3


def claim_output_dir(cfg, *, resume: bool) -> None:
    """Make sure that ``OUTPUT_DIR`` is free, or holds the run that is to be resumed; writes nothing.

    To be called on all ranks before ``default_setup``, which overwrites ``config.yaml``. Resuming in a folder
    without a run starts one.

    Raises:
        UserError: the folder holds a run and ``resume`` is False, or that run's ``config.yaml`` is missing,
            unreadable or differs from ``cfg`` in a key that defines a run.
    """
    refusal = _refusal(cfg, resume) if comm.is_main_process() else None
    refusal = comm.all_gather(refusal)[0]  # all ranks stop together, also where they do not share a disk
    if refusal:
        raise UserError(refusal)


def _refusal(cfg, resume: bool) -> str | None:
    folder = cfg.OUTPUT_DIR
    if os.path.exists(folder) and not os.path.isdir(folder):
        return f"OUTPUT_DIR {folder} is a file; name a folder."
    held = [name for name in _RUN_FILES if _is_filled(os.path.join(folder, name))]
    if not held:
        return None
    if not resume:
        return f"OUTPUT_DIR {folder} holds a run already ({held[0]}); name another or continue with --resume."
    path = os.path.join(folder, "config.yaml")
    try:
        with open(path, encoding="utf-8") as file:
            stored = flatten(yaml.safe_load(file))
    except (OSError, yaml.YAMLError, AttributeError):
        return f"OUTPUT_DIR {folder} holds a run whose {path} cannot be read; restore it or name another."
    wanted = flatten(yaml.safe_load(cfg.dump()))
    return _difference(stored, wanted, folder, has_checkpoint="last_checkpoint" in held)


def _is_filled(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def flatten(node: dict, prefix: str = "") -> dict:
    """Leaves by dotted key."""
    leaves = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        leaves.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return leaves


def _difference(stored: dict, wanted: dict, folder: str, *, has_checkpoint: bool) -> str | None:
    # MODEL.WEIGHTS is only where the first iteration starts from: a checkpoint overrides it
    free = _FREE_KEYS | {"MODEL.WEIGHTS"} if has_checkpoint else _FREE_KEYS
    for leaves in (stored, wanted):
        for key in ("DATASETS.COCO", "DATASETS.VOC"):  # data sets to be evaluated on may come and go
            leaves[key] = [row for row in leaves.get(key, ()) if row[0] in leaves.get("DATASETS.TRAIN", ())]
    differing = [
        f"{key} was {stored.get(key, _ABSENT)!r} and is {wanted.get(key, _ABSENT)!r}"
        for key in sorted({*stored, *wanted})
        if key not in free and not key.startswith(_FREE_PREFIX)
        and stored.get(key, _ABSENT) != wanted.get(key, _ABSENT)
    ]
    if not differing:
        return None
    more = f" and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
    return (
        f"OUTPUT_DIR {folder} holds a run with another config: {', '.join(differing[:_MAX_NAMED])}{more}; "
        "resume with the old values, or name another folder."
    )
