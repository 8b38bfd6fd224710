"""A teacher's detections as a distillation sees them, and on images that are prepared otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from ...config.class_names import match_classes
from ...data.classes import dataset_classes
from ...errors import UserError
from ...teacher import Teacher

# In the order of BGR.
STATISTICS = {
    "caffe's statistics": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "ImageNet's statistics": ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
    "pixels from 0 to 1": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
}


@dataclass(frozen=True)
class Preparation:
    """Another way to prepare the images, which would do better if the teacher's config were wrong.

    Attributes:
        name: what is other.
        remedy: what to do if it is better.
        swap: exchange red and blue.
        statistics: mean and standard deviation of each channel, in the teacher's order.
        cfg: whose INPUT sizes are taken.
    """

    name: str
    remedy: str
    swap: bool = False
    statistics: tuple[Sequence[float], Sequence[float]] | None = None
    cfg: CfgNode | None = None


def other_preparations(cfg: CfgNode, teacher: Teacher) -> list[Preparation]:
    """Those that differ from what the student's config and the teacher's say."""
    found = [Preparation("with red and blue exchanged", "correct INPUT.FORMAT of the teacher's config", swap=True)]
    own = tuple(map(_values, teacher.staged.pixel_statistics))
    for name, pair in STATISTICS.items():
        statistics = tuple(tuple(values[::-1] if teacher.input_format == "RGB" else values) for values in pair)
        if not torch.allclose(torch.tensor(own), torch.tensor(statistics), rtol=0.02):
            remedy = "correct MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of the teacher's config"
            found.append(Preparation(f"with {name}", remedy, statistics=statistics))
    theirs = teacher.cfg.INPUT
    sizes = [(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST) for node in (cfg.INPUT, theirs)]
    if sizes[0] != sizes[1]:
        remedy = (
            f"train the student on images of another size (INPUT.MIN_SIZE_TRAIN; the teacher's own are {sizes[1][0]}, "
            f"the student's {sizes[0][0]}), or take a teacher of the student's size"
        )
        resized = cfg.clone()
        resized.defrost()
        resized.INPUT.MIN_SIZE_TEST, resized.INPUT.MAX_SIZE_TEST = sizes[1]
        found.append(Preparation("in the size of the teacher's config", remedy, cfg=resized))
    return found


class TeacherDetector:
    """A teacher that detects the student's classes in the student's images, as it sees them in a distillation.

    Raises:
        UserError: the class names of student or teacher are not known, and their numbers differ.
    """

    def __init__(self, cfg: CfgNode, teacher: Teacher) -> None:
        self.teacher = teacher
        self.student_format = cfg.INPUT.FORMAT
        ours, theirs = dataset_classes(cfg), list(teacher.classes)
        if ours and theirs:
            aliases = () if ours == theirs else cfg.MODEL.DISTILL.TEACHER.CLASS_ALIASES
            sources = match_classes(ours, theirs, aliases)
        elif len(ours) == teacher.staged.num_classes:
            sources = list(range(len(ours)))
        else:
            raise UserError(
                f"The data has {len(ours)} classes and the teacher {teacher.staged.num_classes}, whose names are not "
                "known; name them in DATASETS.CLASSES of the teacher's config, such as by MODEL.DISTILL.TEACHER.OPTS."
            )
        # Index -1 is a class of which the student knows nothing.
        self._index = torch.full((teacher.staged.num_classes,), -1)
        for ours_index, source in enumerate(sources):
            if source is not None:
                self._index[source] = ours_index

    @torch.no_grad()
    def __call__(
        self, inputs: Sequence[dict[str, Any]], preparation: Preparation | None = None
    ) -> list[dict[str, Any]]:
        """Each image's ``instances`` on the CPU, boxes only, with the student's classes."""
        inputs = self.teacher.in_own_format(inputs, self.student_format)
        if preparation is not None:
            inputs = [{**x, "image": self._prepared(x["image"], preparation)} for x in inputs]
        return [{"instances": self._of_student(output["instances"])} for output in self.teacher.model(inputs)]

    def _prepared(self, image: torch.Tensor, preparation: Preparation) -> torch.Tensor:
        if preparation.swap:
            image = image.flip(0)
        if preparation.statistics is not None:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in preparation.statistics)
            own_mean, own_std = (x.cpu().view(3, 1, 1) for x in self.teacher.staged.pixel_statistics)
            image = (image - mean) / std * own_std + own_mean  # what the model then makes (image - mean) / std
        return image

    def _of_student(self, found: Instances) -> Instances:
        found = found.to("cpu")
        classes = self._index[found.pred_classes]
        result = Instances(
            found.image_size, pred_boxes=found.pred_boxes, scores=found.scores, pred_classes=classes
        )
        return result[classes >= 0]


def _values(x: torch.Tensor) -> tuple[float, ...]:
    return tuple(x.flatten().tolist())
