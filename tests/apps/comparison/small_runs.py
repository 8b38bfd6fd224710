"""Output folders of runs on small real images: real checkpoints, metrics written by Detectron2's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage, JSONWriter

from d2_distill.detectors.building import build_detector

from ...data.small_sets import write_coco
from ...small_detectors import detector_cfg

ITERATIONS = (9, 19)  # of the evaluations, counted from 0
METRICS = {"AP": 20.0, "AP50": 40.0, "AP75": float("nan"), "APs": 10.0, "AP-cat": 30.0, "AP-dog": 10.0}


def write_data(folder: Path) -> dict[str, Any]:
    """Keys of the config below DATASETS: a test set of five images, cats and dogs."""
    row = write_coco(folder, sizes=((48, 40), (40, 48), (48, 48), (44, 40), (48, 40)))
    return {"COCO": (row,), "TEST": (row[0],)}


def write_run(
    folder: Path,
    *,
    data: Mapping[str, Any],
    seed: int = 1,
    metrics: Mapping[str, float] | None = None,
    iterations: Sequence[int] = ITERATIONS,
    checkpoint: str = "model_final.pth",
    **overrides: Any,
) -> Path:
    """What a training leaves: config.yaml, metrics.json, a checkpoint and the pointer to it.

    Args:
        data: keys of the config below DATASETS.
        metrics: of the last evaluation; the one before had half of each.
        overrides: keys of the config below MODEL, with ``__`` for the dots.
    """
    folder.mkdir(parents=True)
    cfg = detector_cfg("RetinaNet", **{"RETINANET__NUM_CLASSES": 2, "RETINANET__SCORE_THRESH_TEST": 0.0, **overrides})
    cfg.merge_from_list([item for key, value in data.items() for item in (f"DATASETS.{key}", value)])
    cfg.INPUT.MIN_SIZE_TEST, cfg.SEED, cfg.OUTPUT_DIR = 48, seed, str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    if checkpoint:
        torch.manual_seed(seed)
        torch.save({"model": build_detector(cfg).state_dict()}, folder / checkpoint)
        (folder / "last_checkpoint").write_text(checkpoint)
    values: dict[str, float] = {f"bbox/{name}": value for name, value in (metrics or METRICS).items()}
    writer = JSONWriter(str(folder / "metrics.json"))
    with EventStorage() as storage:
        for iteration in iterations:
            storage.iter = iteration
            storage.put_scalars(total_loss=3.0 - iteration / 10 + seed, loss_cls=1.0, loss_box_reg=0.5)
            storage.put_scalar("train_seconds", 50.25 * (iteration + 1), smoothing_hint=False)
            for name, value in values.items():
                storage.put_scalar(name, value if iteration == iterations[-1] else value / 2, smoothing_hint=False)
            writer.write()
    writer.close()
    return folder
