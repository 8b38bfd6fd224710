"""Which student features face which teacher features, and what a pair must share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.class_names import ALIASES_KEY, listed
from ..errors import PairError, UserError
from ..staged import StagedDense, StagedDetector
from ..teacher import Teacher

# The towers that most heads have -> the output that each is for.
TOWERS = {"cls": "logits", "box": "deltas"}


@dataclass(frozen=True)
class FeaturePair:
    """A student map and the teacher map of the same stride."""

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int


def pair_features(
    student: StagedDetector, teacher: StagedDetector, in_features: Sequence[str], key: str
) -> list[FeaturePair]:
    """Pair feature maps by stride.

    Args:
        student, teacher: the detectors.
        in_features: the student's features wanted; empty takes all whose stride the teacher has too.
        key: config key of ``in_features``, for error messages.

    Raises:
        UserError: a feature is unknown or has no counterpart.
        PairError: there is no common stride at all.
    """
    ours, theirs = student.feature_shapes(), teacher.feature_shapes()
    by_stride = {shape.stride: name for name, shape in theirs.items()}
    for name in in_features:
        if name not in ours:
            raise UserError(f"{key} has {name!r}, which the student lacks; choose from {', '.join(ours)}.")
        if ours[name].stride not in by_stride:
            raise UserError(
                f"{key} has {name!r} of stride {ours[name].stride}, and the teacher ({teacher.kind}) has "
                f"strides {sorted(by_stride)} only; leave it out."
            )
    names = list(in_features) or [name for name, shape in ours.items() if shape.stride in by_stride]
    if not names:
        raise PairError(
            f"{key}: the student ({student.kind}, strides {[s.stride for s in ours.values()]}) and the "
            f"teacher ({teacher.kind}, strides {sorted(by_stride)}) have no feature map of the same stride; "
            "use feature pyramids with common levels (MODEL.FPN.IN_FEATURES)."
        )
    counterparts = {name: by_stride[ours[name].stride] for name in names}
    return [
        FeaturePair(name, other, ours[name].channels, theirs[other].channels)
        for name, other in counterparts.items()
    ]


def describe_pairs(pairs: Sequence[FeaturePair]) -> str:
    """Return in a few words which maps face each other, and where channels are adapted."""
    names = [p.student if p.student == p.teacher else f"{p.student} with the teacher's {p.teacher}" for p in pairs]
    adapted = {f"{p.student_channels} to {p.teacher_channels}" for p in pairs if p.student_channels != p.teacher_channels}
    suffix = f"; 1x1 convolutions adapt the channels, {', '.join(sorted(adapted))}" if adapted else ""
    return f"maps {', '.join(names)}{suffix}"


def require_same_channels(pairs: Sequence[FeaturePair], method: str, *, adapter: str = "") -> None:
    """Check that maps can be compared channel by channel.

    Args:
        adapter: config key that is False and would adapt the channels, if the method has one.

    Raises:
        PairError: two maps differ in their channels, and there is no such key.
        UserError: they differ, and there is one.
    """
    for pair in pairs:
        if pair.student_channels != pair.teacher_channels:
            message = (
                f"{method} compares channel by channel, but the student's {pair.student} has "
                f"{pair.student_channels} channels and the teacher's {pair.teacher} has "
                f"{pair.teacher_channels}; give both the same MODEL.FPN.OUT_CHANNELS"
            )
            raise UserError(f"{message}, or set {adapter} to True.") if adapter else PairError(f"{message}.")


def require_teacher(teacher: Teacher | None, method: str) -> Teacher:
    """Return the teacher.

    Raises:
        PairError: there is none.
    """
    if teacher is None:
        raise PairError(f"{method} needs a teacher; set MODEL.DISTILL.TEACHER.CONFIG_FILE and .WEIGHTS.")
    return teacher


def require_same_strides(student: StagedDense, teacher: StagedDense, method: str) -> None:
    """Predictions can be compared location by location."""
    ours = [shape.stride for shape in student.feature_shapes().values()]
    theirs = [shape.stride for shape in teacher.feature_shapes().values()]
    if ours != theirs:
        raise PairError(
            f"{method} compares predictions location by location, but the student's head reads strides "
            f"{ours} and the teacher's {theirs}; give both heads the same IN_FEATURES."
        )


def same_anchors(student: StagedDense, teacher: StagedDense) -> bool:
    """Whether the anchors of two detectors of the same strides are the same."""
    mine, other = (detector.innermost.anchor_generator for detector in (student, teacher))
    pairs = zip(mine.cell_anchors, other.cell_anchors)
    same_grid = type(mine) is type(other) and mine.offset == other.offset
    return same_grid and all(a.shape == b.shape and a.allclose(b) for a, b in pairs)


def require_same_outputs(student: StagedDense, teacher: StagedDense, method: str) -> None:
    """Predictions can be compared one by one: same anchors on the same levels."""
    require_same_strides(student, teacher, method)
    if not same_anchors(student, teacher):
        raise PairError(
            f"{method} compares predictions anchor by anchor, but the anchors of the student ({student.kind}) and the "
            f"teacher ({teacher.kind}) differ; make their MODEL.ANCHOR_GENERATOR or ANCHOR_SCALE equal."
        )


def require_same_classes(student: StagedDetector, teacher: Teacher, method: str) -> None:
    """Class k means the same on both sides, as far as their names are known."""
    if teacher.lacks:
        raise PairError(
            f"{method} compares class scores, but the teacher does not know {len(teacher.lacks)} of the student's "
            f"classes, {', '.join(map(repr, teacher.lacks))} (its own are {listed(teacher.classes)}); "
            f"name them in {ALIASES_KEY} if it has them under other names, or train the teacher on them."
        )
    ours, theirs = student.num_classes, teacher.staged.num_classes
    if ours != theirs:
        raise PairError(
            f"{method} compares class scores, but the student has {ours} classes and the teacher {theirs}; "
            "name the classes of both in DATASETS.CLASSES (the teacher's such as by MODEL.DISTILL.TEACHER.OPTS), so "
            "that they can be matched, or train the teacher on the student's classes."
        )
