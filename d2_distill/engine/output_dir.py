"""Guards the output folder of a run against another run."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

import yaml
from detectron2.utils import comm

from ..checkpoint.resuming import find_resumable
from ..config.keys import get_distill_cfg
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
    held += sorted(os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(folder), "model_*.pth")))
    if not held:
        return None
    if not resume:
        return f"OUTPUT_DIR {folder} holds a run already ({held[0]}); name another or continue with --resume."
    path, dumped = os.path.join(folder, "config.yaml"), cfg.dump()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        # A process that is killed while it starts may leave the beginning of the same config.
        stored = flatten(yaml.safe_load(dumped if dumped.startswith(text) else text))
    except (OSError, yaml.YAMLError, AttributeError):
        return f"OUTPUT_DIR {folder} holds a run whose {path} cannot be read; restore it or name another."
    wanted = flatten(yaml.safe_load(dumped))
    # A run of an earlier version knows nothing of later keys, whose defaults are what it did.
    stored = {**_defaults(wanted), **stored}
    try:
        return _difference(stored, wanted, folder, has_checkpoint=bool(find_resumable(folder)))
    except UserError as error:
        return str(error)


def _defaults(keys: Iterable[str]) -> dict:
    """Return the default values of keys; those of a user's own files have none here."""
    defaults = flatten(yaml.safe_load(get_distill_cfg().dump()))
    return {key: defaults[key] for key in keys if key in defaults}


def _is_filled(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def end_last_line(path: str) -> None:
    """Cut what a killed process wrote of a line, so that the next line is whole."""
    if not os.path.isfile(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


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
