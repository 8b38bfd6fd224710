"""What can be chosen: detectors, backbones, methods, and the pairs that these serve.

All of it is asked of the registries and of the methods' own checks, on small instances of the detectors. So what a
user's file registers is listed, too.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..assistants.dense import StudentFeatures
from ..detectors.building import build_detector
from ..errors import PairError
from ..methods import DISTILL_METHOD_REGISTRY, list_methods, refusals
from ..staged import StagedDetector, adapter_of, stage_detector
from ..teacher import Teacher

WIDTH = 110
REG_MAX = "REG_MAX"
CASCADE = "CascadeROIHeads"
# Below MODEL: detectors on given maps instead of a backbone, with narrow heads; one teacher serves all students.
_DETECTOR: dict[str, Any] = {
    "DEVICE": "cpu",
    "BACKBONE.NAME": StudentFeatures.__name__,
    "RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "ROI_HEADS.NAME": "StandardROIHeads",
    "ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD.NUM_FC": 2,
    "ROI_BOX_HEAD.FC_DIM": 16,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
}
_CASCADE: dict[str, Any] = {"ROI_HEADS.NAME": CASCADE, "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
_CHANNELS = 32
_STAGES = ["res2", "res3", "res4", "res5"]
_BACKBONE: dict[str, Any] = {
    "DEVICE": "cpu",
    "RESNETS.DEPTH": 18,
    "RESNETS.RES2_OUT_CHANNELS": 64,
    "RESNETS.OUT_FEATURES": _STAGES,
    "FPN.IN_FEATURES": _STAGES,
    "FPN.OUT_CHANNELS": _CHANNELS,
    "MOBILENETV2.WIDTH_MULT": 0.25,
    "SLIMMABLE.WIDTH_MULT": 0.25,
    "LOW_RESOLUTION.BACKBONE": "build_p3p7_resnet_fpn_backbone",
    "SWIN.EMBED_DIM": 24,
    "SWIN.DEPTHS": [1, 1, 1, 1],
    "TIMM.NAME": "mobilenetv3_small_050",
}


@dataclass(frozen=True)
class Listed:
    """A small instance of a detector.

    Attributes:
        label: its meta-architecture, and in brackets what the config has besides.
    """

    label: str
    cfg: CfgNode
    staged: StagedDetector

    def as_teacher(self) -> Teacher:
        return Teacher(self.staged.model, input_format=self.cfg.INPUT.FORMAT, cfg=self.cfg)


def print_choices(cfg: CfgNode) -> None:
    """All detectors, backbones, methods and pairs; of the config its methods' keys count, and not its detector's."""
    detectors, failed = list_detectors(cfg)
    table = pairs(detectors)
    alone = {name for (_, teacher), names in table.items() if teacher is None for name in names}
    _print_table(
        "Detectors, to teach (MODEL.META_ARCHITECTURE) and to be taught (MODEL.DISTILL.STUDENT):",
        {**{detector.label: describe_detector(detector.staged) for detector in detectors}, **failed},
    )
    _print_table("Backbones (MODEL.BACKBONE.NAME); those without a pyramid cannot be distilled:", list_backbones(cfg))
    _print_table(
        "Methods (MODEL.DISTILL.METHODS):",
        {name: summary(name) + ("" if name in alone else " Needs a teacher.") for name in list_methods()},
    )
    print(
        "Which methods serve which pair, of detectors with the same classes, strides and channels and with the\n"
        "methods' default keys; what serves your own pair, and why others do not, tells --list --config-file CONFIG:\n"
    )
    _print_pairs(table)


def print_pair(cfg: CfgNode, title: str) -> None:
    """Which methods serve the student and the teacher of a config, and why the others do not.

    Raises:
        UserError: the teacher's config is not valid, or one of the detectors cannot be built.
    """
    student, teacher = stage_detector(build_detector(cfg)), Teacher.untrained(cfg)
    sides = {"Student": f"{student.kind}: {describe_detector(student)}; {_sizes(student)}"}
    if teacher is None:
        sides["Teacher"] = "none (MODEL.DISTILL.TEACHER.CONFIG_FILE)"
    else:
        sides["Teacher"] = f"{teacher.staged.kind}: {describe_detector(teacher.staged)}; {_sizes(teacher.staged)}"
    found = refusals(cfg, student, teacher)
    _print_table(title, sides)
    serving = {name: summary(name) for name, refusal in found.items() if refusal is None}
    _print_table("Methods that serve this pair:", serving or {"none": "as it is"})
    impossible = {name: str(refusal) for name, refusal in found.items() if isinstance(refusal, PairError)}
    _print_table("Methods that cannot serve it:", impossible)
    others = {name: str(found[name]) for name in found if name not in serving and name not in impossible}
    _print_table("Methods that need other values in this config to begin with:", others)


def list_detectors(cfg: CfgNode) -> tuple[list[Listed], dict[str, str]]:
    """Small instances of every registered detector that has stages; label -> reason of those that cannot be built.

    A detector comes again with distributions (``REG_MAX``) and with a cascade, if that makes another detector of it.
    """
    options = {"": {}, REG_MAX: _distributions(cfg), CASCADE: _CASCADE}
    detectors: list[Listed] = []
    failed: dict[str, str] = {}
    for name, model_class in sorted(META_ARCH_REGISTRY):
        if adapter_of(model_class) is None:
            continue
        known = set()
        for option, values in options.items():
            own = _with_values(cfg, {**_DETECTOR, **values, "META_ARCHITECTURE": name})
            try:
                staged = stage_detector(build_detector(own))
            except Exception as error:  # whatever a user's own detector misses in these configs
                failed.setdefault(name, f"not listed below: {type(error).__name__}: {error}")
                continue
            if describe_detector(staged) not in known:
                known.add(describe_detector(staged))
                detectors.append(Listed(f"{name} ({option})" if option else name, own, staged))
    return detectors, failed


def pairs(detectors: Sequence[Listed]) -> dict[tuple[str, str | None], frozenset[str]]:
    """(student's label, teacher's label or None) -> the methods that serve them."""
    teachers: dict[str | None, Teacher | None] = {None: None}
    teachers.update({detector.label: detector.as_teacher() for detector in detectors})
    return {
        (student.label, label): frozenset(
            name for name, refusal in refusals(student.cfg, student.staged, teacher).items() if refusal is None
        )
        for student in detectors
        for label, teacher in teachers.items()
    }


def list_backbones(cfg: CfgNode) -> dict[str, str]:
    """Name of each registered builder -> the levels of its pyramid and what its docstring says."""
    found = {}
    for name, build in sorted(BACKBONE_REGISTRY):
        if name == StudentFeatures.__name__:  # not to be chosen
            continue
        try:
            shapes = build(_with_values(cfg, _BACKBONE), ShapeSpec(channels=3)).output_shape()
            pyramid = len({shape.channels for shape in shapes.values()}) == 1 < len(shapes)
            kind = f"pyramid of {', '.join(shapes)}." if pyramid else "no pyramid."
        except Exception as error:  # a user's own may need keys of its own
            kind = f"not tried: {type(error).__name__}: {error}."
        found[name] = f"{kind} {_first_paragraph(build)}".strip()
    return found


def describe_detector(staged: StagedDetector) -> str:
    """What kind of detector it is, as far as methods ask."""
    family = "one-stage" if staged.family == "dense" else staged.family
    return ", ".join([family, *staged.traits()])


def summary(method: str) -> str:
    """The first paragraph of a method's docstring, or of its file's."""
    method_class = DISTILL_METHOD_REGISTRY.get(method)
    return _first_paragraph(method_class) or _first_paragraph(sys.modules.get(method_class.__module__))


def _first_paragraph(documented: Any) -> str:
    first = (getattr(documented, "__doc__", None) or "").strip().split("\n\n")[0]
    plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``", r"\1", " ".join(first.split()))  # without reStructuredText
    return "" if plain.startswith("Args:") else plain


def _sizes(staged: StagedDetector) -> str:
    shapes = staged.feature_shapes().values()
    channels = sorted({shape.channels for shape in shapes})
    strides = ", ".join(str(shape.stride) for shape in shapes)
    return f"strides {strides}; {', '.join(map(str, channels))} channels; {staged.num_classes} classes"


def _with_values(cfg: CfgNode, values: dict[str, Any]) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.STUDENT_FEATURES = [[f"p{level}", _CHANNELS, 2**level] for level in range(2, 8)]
    cfg.merge_from_list([item for key, value in values.items() for item in (f"MODEL.{key}", value)])
    return cfg


def _distributions(cfg: CfgNode) -> dict[str, Any]:
    """Values with which every detector that can predicts distributions."""
    values: dict[str, Any] = {
        f"{name}.{REG_MAX}": 16 for name, node in cfg.MODEL.items() if isinstance(node, CfgNode) and REG_MAX in node
    }
    return {**values, "RETINANET.BBOX_REG_LOSS_TYPE": "giou"}


def _print_pairs(table: dict[tuple[str, str | None], frozenset[str]]) -> None:
    """Students with the same rows, and in a row teachers with the same methods, share their lines."""
    students = list(dict.fromkeys(student for student, _ in table))
    teachers = list(dict.fromkeys(teacher for _, teacher in table))
    always = frozenset.intersection(*(names for (_, teacher), names in table.items() if teacher is not None))
    print(f"  any student, any teacher: {', '.join(sorted(always)) or 'none'}; and")
    for group in _groups(students, lambda student: tuple(table[student, teacher] for teacher in teachers)):
        print(_wrapped(f"student {', '.join(group)}", "  "))
        for those in _groups(teachers, lambda teacher: table[group[0], teacher] - always):
            names = sorted(table[group[0], those[0]] - always)
            if names:
                whom = " or ".join(filter(None, [
                    "no teacher" if None in those else "", "teacher " * any(those) + ", ".join(filter(None, those))
                ]))
                print(_wrapped(f"{whom}: {', '.join(names)}", "    "))


def _groups(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _print_table(title: str, rows: dict[str, str]) -> None:
    if not rows:
        return
    print(title)
    width = max(map(len, rows), default=0) + 2
    for name, text in rows.items():
        print(_wrapped(text, f"  {name:{width}}", " " * (width + 2)))
    print()


def _wrapped(text: str, first: str, others: str | None = None) -> str:
    others = first + "  " if others is None else others
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False) or first
