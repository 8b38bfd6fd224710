#!/usr/bin/env python3
"""Draws what student and teacher look at on each pyramid level of an image, and where the methods' regions lie.

    python tools/show_regions.py --config-file output/bccd/gfl_ld/config.yaml \\
        MODEL.WEIGHTS output/bccd/gfl_ld/model_final.pth --images 4 --output output/regions

A picture for each image: its ground truth and the detections; the energy and the attention of the feature maps; FGD's
masks; and the cells that the regions of LD and of FeatureImitation select, computed by the code that trains. The images
are spread evenly over the training set, or named by --input; boxes are known of images of the config's data sets.

MODEL.WEIGHTS "" draws a student that is not trained yet. A config without a teacher, or with
MODEL.DISTILL.TEACHER.CONFIG_FILE "", draws the student alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  before detectron2: chooses which one is imported

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.whole_files import whole_file
from d2_distill.apps.pictures.heatmaps import Scene, draw_levels
from d2_distill.apps.pictures.level_maps import SELECTED, feature_maps, focal_maps, region_maps
from d2_distill.config.reading import split_overrides
from d2_distill.data.augmentation import build_augmentation
from d2_distill.data.checks import check_dataset
from d2_distill.data.classes import dataset_classes
from d2_distill.data.mapper import CheckedDatasetMapper
from d2_distill.data.registration import register_datasets
from d2_distill.data.subset import evenly_spread
from d2_distill.detectors.building import build_detector
from d2_distill.engine.evaluate import load_detector
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError, reported
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

Record = dict[str, Any]  # an image and, if they are known, its annotations, in Detectron2's standard form
WITHOUT_BOXES = ("gibox",)  # regions that do not ask for the ground truth


class Pair:
    """A student, and its teacher if the config names one, on single images."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        model = load_detector(cfg) if cfg.MODEL.WEIGHTS else build_detector(cfg)
        self.student = stage_detector(model.eval())
        self.teacher: Teacher | None = Teacher.from_config(cfg)
        self.class_names = dataset_classes(cfg)
        self._teachers_classes = None
        if self.teacher is not None and self.teacher.lacks:
            # Other classes than the student's come behind these.
            self.class_names = list(dict.fromkeys([*self.class_names, *self.teacher.classes]))
            self._teachers_classes = torch.tensor([self.class_names.index(name) for name in self.teacher.classes])
        self._mapper = CheckedDatasetMapper(
            is_train=True, augmentations=build_augmentation(cfg, is_train=False), image_format=cfg.INPUT.FORMAT
        )

    @torch.no_grad()
    def draw(self, record: Record, regions: Sequence[str], threshold: float):
        """A figure of an image, and a sentence for each region that the pair does not have."""
        sample = self._mapper(record)
        labelled = "instances" in sample
        if not labelled:
            sample["instances"] = Instances(
                sample["image"].shape[-2:], gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
            )
            regions = [name for name in regions if name in WITHOUT_BOXES]
        image = sample["image"].permute(1, 2, 0).numpy()
        image = image[:, :, ::-1] if self.cfg.INPUT.FORMAT == "BGR" else image
        truth = sample["instances"]
        boxes = {f"ground truth: {len(truth)}" if labelled else "no boxes known": truth}
        found = self._detect(self.student.model, sample, threshold)
        boxes[f"student finds: {len(found)}"] = found
        student, teacher_run = self._runs(sample)
        if self.teacher is not None:
            [own] = self.teacher.in_own_format([sample], self.cfg.INPUT.FORMAT)
            found = self._detect(self.teacher.model, own, threshold)
            if self._teachers_classes is not None:
                found.pred_classes = self._teachers_classes[found.pred_classes]
            boxes[f"teacher finds: {len(found)}"] = found
        features = feature_maps(student, teacher_run)
        selected, missing = region_maps(self.cfg, regions, student, teacher_run, self.teacher)
        if labelled:
            focal = focal_maps(student, features[-1] if teacher_run is not None else None)
            bands = [features + focal, selected]
        else:
            bands = [features + selected]
        strides = {name: shape.stride for name, shape in self.student.feature_shapes().items()}
        scene = Scene(np.ascontiguousarray(image), boxes, self.class_names)
        return draw_levels(scene, strides, bands), missing

    def _runs(self, sample: dict[str, Any]):
        device = self.student.device
        images, truth = self.student.preprocess([sample]), [sample["instances"].to(device)]
        teacher_run = None
        if self.teacher is not None:
            alike = self.teacher.normalises_like(self.student, self.cfg.INPUT.FORMAT)
            teacher_run = self.teacher.run(
                [sample], images, student_format=self.cfg.INPUT.FORMAT, normalises_alike=alike, gt_instances=truth
            )
        return self.student.run(images, truth, frozen=True), teacher_run

    @staticmethod
    def _detect(model: nn.Module, sample: dict[str, Any], threshold: float) -> Instances:
        """Detections in pixels of the image as the model sees it."""
        [output] = model([{"image": sample["image"]}])
        found = output["instances"].to("cpu")
        return found[found.scores >= threshold]


def find_records(cfg: CfgNode, files: Sequence[str], number: int) -> list[Record]:
    """Records of the named files, with boxes if they are in a data set of the config; without files, of so many images.

    Raises:
        UserError: a data set cannot be used, a file is missing, or there is no data set.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not files and not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty; name images by --input.")
    if files:
        known = {os.path.realpath(record["file_name"]): record for name in names for record in _records(name)}
        return [known.get(os.path.realpath(file)) or _without_boxes(file) for file in files]
    return evenly_spread(_records(names[0]), number)


def _records(name: str) -> list[Record]:
    check_dataset(name, key="DATASETS", strict=False)
    return DatasetCatalog.get(name)


def _without_boxes(file: str) -> Record:
    if not os.path.isfile(file):
        raise UserError(f"--input: there is no file {file}; correct its path.")
    return {"file_name": file}


def _named(records: Sequence[Record]) -> dict[str, Record]:
    """By the names of their files, numbered where folders have files of the same name."""
    named: dict[str, Record] = {}
    for record in records:
        name = stem = Path(record["file_name"]).stem
        number = 1
        while name in named:
            number += 1
            name = f"{stem}_{number}"
        named[name] = record
    return named


def show(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    records = find_records(cfg, args.input, args.images)
    pair = Pair(cfg)
    told: set = set()
    for number, (name, record) in enumerate(_named(records).items(), start=1):
        figure, missing = pair.draw(record, args.regions, args.score_threshold)
        for sentence in missing:
            if sentence not in told:
                print(sentence)
        told.update(missing)
        target = args.output / f"{name}.png"
        with whole_file(target) as path:
            figure.savefig(path, dpi=args.dpi)
        print(f"{number} of {len(records)}: {target}", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", nargs="+", default=[], metavar="IMAGE", help="image files")
    parser.add_argument("--images", type=whole_number(1), default=3, help="without --input (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/regions"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--regions", nargs="+", choices=list(SELECTED), default=list(SELECTED), metavar="REGION",
        help=f"of {', '.join(SELECTED)} (default: all that the pair has)",
    )
    parser.add_argument("--score-threshold", type=float, default=0.5, help="of detections (default: %(default)s)")
    parser.add_argument("--dpi", type=whole_number(1), default=100, help="pixels an inch (default: %(default)s)")
    parser.add_argument("opts", nargs="*", help="config keys and values")
    args = parser.parse_args()
    args.input, opts = split_overrides(args.input)
    args.opts += opts
    with reported():
        show(args)


if __name__ == "__main__":
    main()
