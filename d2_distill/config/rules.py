"""What the values of config keys have to be: one table, from which configs are checked and docs/keys.md is written.

Types are Detectron2's business: a value has that of its default.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from detectron2.config import CfgNode

from ..errors import UserError
from .keys import get_distill_cfg


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        key: of the config; providers may lack it.
        meaning: what it sets, for the page.
        wanted: what its values have to be, in words.
        holds: whether a value is right in a config.
        choices: names that it may have; () for other values.
    """

    key: str
    meaning: str
    wanted: str
    holds: Callable[[Any, CfgNode], bool]
    choices: Sequence[str] = ()

    def fault(self, cfg: CfgNode) -> str | None:
        """Return a sentence about the value in a config, None if it is right or if there is no such key."""
        value = value_of(cfg, self.key)
        try:
            if value is ABSENT or self.holds(value, cfg):
                return None
        except TypeError:  # an element of another type
            pass
        near = difflib.get_close_matches(str(value), self.choices, n=1)
        return f"{self.key} is {value!r}; it must be {self.wanted}" + (f" (did you mean {near[0]!r}?)." if near else ".")


ABSENT = object()


def value_of(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key, or a marker where there is none."""
    try:
        return reduce(getitem, key.split("."), cfg)
    except (KeyError, TypeError):
        return ABSENT


def number(key: str, meaning: str, least: float = 0, most: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """A number from ``least`` to ``most``; ``above`` and ``below`` leave out the ends."""

    def holds(value: Any, cfg: CfgNode) -> bool:
        return (value > least if above else value >= least) and (value < most if below else value <= most)

    words = [f"{'above' if above else 'at least'} {least:g}"]
    if most < math.inf:
        words.append(f"{'below' if below else 'at most'} {most:g}")
    return Rule(key, meaning, " and ".join(words), holds)


def part(key: str, meaning: str) -> Rule:
    return number(key, meaning, 0, 1)


def choice(key: str, meaning: str, *names: str) -> Rule:
    return Rule(key, meaning, f"one of {', '.join(map(repr, names))}", lambda value, cfg: value in names, names)


def each(key: str, meaning: str, wanted: str, holds: Callable[[Any], bool], *, empty: bool = False) -> Rule:
    """A list, of which each element holds; it may be ``empty``."""
    words = f"{'' if empty else 'not empty, '}each {wanted}"
    return Rule(key, meaning, words, lambda value, cfg: (empty or len(value) > 0) and all(map(holds, value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _ascends(values: Sequence[Any], cfg: CfgNode) -> bool:
    steps = list(values)
    return all(_is_size(step) for step in steps) and steps == sorted(set(steps))


def _train_sizes(values: Any, cfg: CfgNode) -> bool:
    sizes = values if isinstance(values, (list, tuple)) else (values,)
    pair = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    return len(sizes) > 0 and all(map(_is_size, sizes)) and (not pair or len(sizes) == 2 and sizes[0] <= sizes[1])


RULES = (
    Rule("OUTPUT_DIR", "folder of the run", "a path", lambda value, cfg: bool(value.strip()) and "\0" not in value),
    number("SOLVER.MAX_ITER", "steps of the training", 1),
    number("SOLVER.IMS_PER_BATCH", "images of a step, of all processes", 1),
    number("SOLVER.BASE_LR", "learning rate after the warm-up", 0, above=True),
    number("SOLVER.BASE_LR_END", "learning rate at the end of a cosine schedule"),
    number("SOLVER.BIAS_LR_FACTOR", "factor on the rate of biases"),
    number("SOLVER.WEIGHT_DECAY", "weight decay"),
    number("SOLVER.WEIGHT_DECAY_NORM", "weight decay of normalizations"),
    number("SOLVER.MOMENTUM", "of SGD", 0, 1, below=True),
    number("SOLVER.GAMMA", "factor on the rate at each of STEPS", 0, 1, above=True),
    Rule("SOLVER.STEPS", "steps at which the rate drops", "positive whole numbers in ascending order", _ascends),
    number("SOLVER.NUM_DECAYS", "drops of a schedule of fixed gamma", 0),
    number("SOLVER.WARMUP_ITERS", "steps of the warm-up"),
    part("SOLVER.WARMUP_FACTOR", "part of the rate that the warm-up begins with"),
    choice("SOLVER.WARMUP_METHOD", "how the rate rises", "linear", "constant"),
    choice("SOLVER.LR_SCHEDULER_NAME", "the schedule", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    number("SOLVER.CHECKPOINT_PERIOD", "steps between checkpoints", 1),
    number("SOLVER.REFERENCE_WORLD_SIZE", "processes that the schedule was written for; 0 for any"),
    choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "what is clipped", "value", "norm", "full_model"),
    number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "the bound", 0, above=True),
    number("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "the norm", 0, above=True),
    Rule("INPUT.MIN_SIZE_TRAIN", "shorter side of training images, in pixels",
         "one or more positive numbers of pixels, two in order for MIN_SIZE_TRAIN_SAMPLING 'range'", _train_sizes),
    choice("INPUT.MIN_SIZE_TRAIN_SAMPLING", "how it is chosen", "choice", "range"),
    number("INPUT.MAX_SIZE_TRAIN", "bound of the longer side", 1),
    number("INPUT.MIN_SIZE_TEST", "shorter side of test images; 0 leaves them as they are"),
    number("INPUT.MAX_SIZE_TEST", "bound of the longer side", 1),
    choice("INPUT.RANDOM_FLIP", "mirror images in training", "none", "horizontal", "vertical"),
    choice("INPUT.FORMAT", "order of the channels", "BGR", "RGB", "L", "YUV-BT.601"),
    choice("INPUT.MASK_FORMAT", "of masks", "polygon", "bitmask"),
    choice("INPUT.CROP.TYPE", "of random crops", "relative_range", "relative", "absolute", "absolute_range"),
    each("INPUT.CROP.SIZE", "height and width of random crops", "above 0", lambda value: _is_number(value) and value > 0),
    number("DATALOADER.NUM_WORKERS", "processes that load images, for each training process"),
    choice("DATALOADER.SAMPLER_TRAIN", "order of the images", "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
    number("DATALOADER.REPEAT_THRESHOLD", "of repeat-factor sampling", 0, 1),
    number("TEST.EVAL_PERIOD", "steps between evaluations; 0 for the end only"),
    number("TEST.DETECTIONS_PER_IMAGE", "detections that are kept; -1 for all", -1),
    number("TEST.PRECISE_BN.NUM_ITER", "steps for statistics", 1),
    each("MODEL.PIXEL_MEAN", "of the channels", "a number", _is_number),
    each("MODEL.PIXEL_STD", "of the channels", "a number above 0", lambda value: _is_number(value) and value > 0),
    Rule("MODEL.PIXEL_STD", "of the channels", "as long as MODEL.PIXEL_MEAN", lambda value, cfg: len(value) == len(cfg.MODEL.PIXEL_MEAN)),
    Rule("MODEL.DEVICE", "where the model runs", "'cpu' or 'cuda', or another device of PyTorch with its number",
         lambda value, cfg: value.partition(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta", "privateuseone", "pretend")),
    number("MODEL.BACKBONE.FREEZE_AT", "stages that are not trained; 0 for none", 0),
    choice("MODEL.FPN.FUSE_TYPE", "how maps are joined", "sum", "avg"),
    number("MODEL.FPN.OUT_CHANNELS", "channels of the pyramid", 1),
    number("MODEL.RESNETS.NUM_GROUPS", "groups of a convolution", 1),
    number("MODEL.RESNETS.WIDTH_PER_GROUP", "channels of each", 1),
    number("MODEL.RESNETS.RES2_OUT_CHANNELS", "channels at stride 4", 1),
    number("MODEL.RESNETS.STEM_OUT_CHANNELS", "channels of the stem", 1),
    *(
        rule
        for node in ("RETINANET", "FCOS", "ATSS", "GFL", "TOOD")
        for rule in (
            number(f"MODEL.{node}.NUM_CLASSES", "classes of the data", 1),
            number(f"MODEL.{node}.NUM_CONVS", "convolutions of a tower", 0),
            part(f"MODEL.{node}.SCORE_THRESH_TEST", "lowest score of a detection"),
            part(f"MODEL.{node}.NMS_THRESH_TEST", "IoU from which boxes suppress others"),
            number(f"MODEL.{node}.TOPK_CANDIDATES_TEST", "candidates of a level", 1),
            part(f"MODEL.{node}.PRIOR_PROB", "score of an untrained detector"),
            each(f"MODEL.{node}.IN_FEATURES", "levels that the head reads", "a name of a level", lambda value: isinstance(value, str)),
        )
    ),
    *(
        rule
        for node in ("RETINANET", "FCOS", "ATSS", "TOOD")
        for rule in (
            part(f"MODEL.{node}.FOCAL_LOSS_ALPHA", "of the focal loss"),
            number(f"MODEL.{node}.FOCAL_LOSS_GAMMA", "of the focal loss"),
        )
    ),
    number("MODEL.ROI_HEADS.NUM_CLASSES", "classes of the data", 1),
    number("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "RoIs that are sampled", 1),
    part("MODEL.ROI_HEADS.POSITIVE_FRACTION", "part of the positives among them"),
    part("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "lowest score of a detection"),
    part("MODEL.ROI_HEADS.NMS_THRESH_TEST", "IoU from which boxes suppress others"),
    number("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "anchors that are sampled", 1),
    part("MODEL.RPN.POSITIVE_FRACTION", "part of the positives among them"),
    part("MODEL.RPN.NMS_THRESH", "IoU from which proposals suppress others"),
    number("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "proposals of a level before NMS", 1),
    number("MODEL.RPN.PRE_NMS_TOPK_TEST", "proposals of a level before NMS", 1),
    number("MODEL.RPN.POST_NMS_TOPK_TRAIN", "proposals after NMS", 1),
    number("MODEL.RPN.POST_NMS_TOPK_TEST", "proposals after NMS", 1),
    number("MODEL.DISTILL.GRADIENT_RATIO_PERIOD", "steps between two reports of gradient ratios; 0 for none"),
    number("MODEL.DISTILL.BALANCE_PERIOD", "steps between two measurements of balanced weights", 1),
)


def check_config(cfg: CfgNode, *, source: str) -> None:
    """
    Args:
        source: what the message calls the config.

    Raises:
        UserError: values are not what they have to be; the message has all of them.
    """
    faults = list(_faults(cfg))
    if faults:
        raise UserError(f"{source}: {' '.join(faults)}")


def _faults(cfg: CfgNode) -> Iterator[str]:
    unusable = dict(_without_value(cfg, get_distill_cfg()))
    yield from unusable.values()
    told = set(unusable)
    for rule in RULES:
        fault = None if rule.key in told else rule.fault(cfg)
        if fault is not None:
            told.add(rule.key)
            yield fault


def _without_value(node: CfgNode, defaults: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys whose value is null or no number where a default says otherwise, with a sentence."""
    for name, default in defaults.items():
        key, value = f"{prefix}{name}", node.get(name)
        if isinstance(default, CfgNode) and isinstance(value, CfgNode):
            yield from _without_value(value, default, f"{key}.")
        elif value is None and default is not None:
            yield key, f"{key} has no value; give it one, such as its default {default!r}."
        elif isinstance(value, float) and not math.isfinite(value) and math.isfinite(default or 0):
            yield key, f"{key} is {value}; give it a finite number."
