"""The staged protocol: a detector run stage by stage, each result computed once and shared by all who ask.

A :class:`StagedDetector` knows how one meta-architecture is cut into stages; a :class:`Run` is one batch
going through them. Detectors keep their own ``forward``, which equals the stages one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, Callable, NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import nn

from .assigners import Assignment, GroundTruth
from .boxes.anchor_grid import AnchorGrid
from .errors import UserError
from .layers.class_outputs import keep_outputs
from .layers.tower import Tap, Tower
from .losses import mean_over_processes

# What kinds of detectors there are; methods say by these which they can teach.
FAMILIES = ("dense", "two-stage", "query")

Taps = Mapping[str, frozenset[Tap]]


class stage(cached_property):
    """A field of a run, computed at the first access, with gradient if the run has it, whoever asks first."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        @wraps(compute)
        def guarded(run: Run) -> Any:
            with torch.set_grad_enabled(run.with_gradient):
                return compute(run)

        super().__init__(guarded)


class Predictor(NamedTuple):
    """A prediction layer and the places in the towers that it reads, (branch, tap) each."""

    reads: tuple[tuple[str, Tap], ...]
    layer: nn.Module


class StagedDetector(ABC):
    """How one meta-architecture is run in stages, and what it is. Holds the model, owns no parameter.

    Methods and tools ask the adapter only. What it does not define itself is read from the model as Detectron2's
    meta-architectures have it: ``backbone``, ``preprocess_image``, ``pixel_mean`` and ``pixel_std``.

    Attributes:
        family: one of :data:`FAMILIES`.
        is_wrapper: whether the model runs another detector inside.
        roi_heads: the box branch of a two-stage detector in stages (:mod:`~d2_distill.detectors.roi_heads`), whose runs
            have ``proposals`` and ``sampled_proposals``; None if there is none.
        has_roi_stages: whether its runs also have ``rois``, the box branch in training stage by stage.
    """

    family: str
    is_wrapper = False
    roi_heads: Any = None
    has_roi_stages = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def num_classes_key(cls, model_class: type[nn.Module], cfg: Any) -> str:
        """Return the config key that sets the number of classes of a detector of ``model_class``."""

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    @property
    def innermost(self) -> nn.Module:
        """The detector that has the heads: the model itself, or the one that it wraps."""
        return self.model

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of foreground classes that the model predicts."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pixel_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, with which :meth:`preprocess` normalizes."""
        return self.model.pixel_mean, self.model.pixel_std

    @property
    def score_threshold(self) -> float | None:
        """Score above which detections are kept; None if it is not known."""
        return None

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Change the model, weights included, into one that knows these of its classes only, in this order.

        What it predicts of them stays the same. A detector that cannot be changed so leaves this out; as a teacher it
        can then guide methods that compare no classes.
        """
        raise NotImplementedError

    def traits(self) -> list[str]:
        """What matters to methods beyond the family, in a few words for ``--list``."""
        return []

    @property
    def size_divisibility(self) -> int:
        """What the sides of a batch are multiples of."""
        return max(self.model.backbone.size_divisibility, 1)

    @abstractmethod
    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each entry of ``Run.features``, in their order."""

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalize and batch the images of Detectron2 dataset dicts."""
        return self.model.preprocess_image(batched_inputs)

    def features(self, images: ImageList) -> dict[str, torch.Tensor]:
        """Feature maps (N, C, H, W) that the heads read."""
        features = self.model.backbone(images.tensor)
        return {name: features[name] for name in self.feature_shapes()}

    @abstractmethod
    def run(
        self,
        images: ImageList,
        gt_instances: list[Instances] | None = None,
        *,
        taps: Taps | None = None,
        frozen: bool = False,
    ) -> Run:
        """Start a run; nothing is computed before a field of it is read.

        Args:
            images: the preprocessed batch.
            gt_instances: ground truth, one entry an image; needed by assignment and losses only.
            taps: branch name -> places in its tower whose features are kept.
            frozen: compute every stage without gradient.
        """


class Run:
    """One batch going through the stages of one detector.

    Whether its stages carry gradient is decided here, at its construction, and not by who reads a stage first.
    """

    def __init__(
        self,
        staged: StagedDetector,
        images: ImageList,
        gt_instances: list[Instances] | None,
        taps: Taps,
        frozen: bool,
    ) -> None:
        self.staged = staged
        self.images = images
        self.gt_instances = gt_instances
        self.wanted_taps = taps
        self.with_gradient = torch.is_grad_enabled() and not frozen

    @stage
    def features(self) -> dict[str, torch.Tensor]:
        """Feature name -> (N, C, H, W)."""
        return self.staged.features(self.images)

    @stage
    def truth(self) -> GroundTruth:
        """The ground truth of the batch, padded."""
        return GroundTruth.from_instances(self.gt_instances)

    @stage
    def losses(self) -> dict[str, torch.Tensor]:
        """The detector's own losses on ground truth, as its ``forward`` returns them in training."""
        raise NotImplementedError


class StagedDense(StagedDetector):
    """A dense detector: towers and predictors shared by all levels.

    Of ``innermost`` it reads what Detectron2's RetinaNet has: ``num_classes``, ``head_in_features``,
    ``anchor_generator``, ``box2box_transform``, ``test_score_thresh``, ``test_nms_thresh`` and
    ``max_detections_per_image``.

    Attributes:
        towers: branch name -> :class:`Tower`.
        predictors: output name -> :class:`Predictor`, in the order in which the head returns the outputs.
        reg_max: last bin of each side's distribution; None if boxes are not predicted as distributions.
        assigns_points: whether locations are assigned by where they lie in a box, not by anchors.
        assigns_by_outputs: whether the assignment depends on the outputs.
    """

    family = "dense"
    towers: dict[str, Tower]
    predictors: dict[str, Predictor]
    reg_max: int | None = None
    assigns_points = False
    assigns_by_outputs = False

    @property
    def num_classes(self) -> int:
        return self.innermost.num_classes

    @property
    def score_threshold(self) -> float:
        return self.innermost.test_score_thresh

    def traits(self) -> list[str]:
        traits = ["points" if self.assigns_points else "anchors"]
        traits += ["centerness"] * ("centerness" in self.predictors)
        return traits + ["distributions"] * (self.reg_max is not None)

    @property
    def anchors_per_cell(self) -> int:
        return self.innermost.anchor_generator.num_anchors[0]

    def keep_classes(self, classes: Sequence[int]) -> None:
        layer = self.predictors["logits"].layer
        scores = layer.out_channels // self.anchors_per_cell
        # After the classes may come an output that is none (GFLv2).
        kept = [*classes, *range(self.num_classes, scores)]
        keep_outputs(layer, [start + k for start in range(0, layer.out_channels, scores) for k in kept])
        self.innermost.num_classes = len(classes)

    @property
    def in_features(self) -> list[str]:
        return list(self.innermost.head_in_features)

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        shapes = self.model.backbone.output_shape()
        return {name: shapes[name] for name in self.in_features}

    @property
    def strides(self) -> list[int]:
        """Pixels a cell of each level."""
        return [shape.stride for shape in self.feature_shapes().values()]

    def tap_channels(self, branch: str, position: int) -> int:
        """Channels of a branch after ``position`` blocks; 0 is the feature map before the tower."""
        if position:
            return self.towers[branch].out_channels(position)
        return next(iter(self.feature_shapes().values())).channels

    def branch_of(self, output: str) -> str:
        """Return the branch whose tower an output is predicted from; of several the first."""
        return self.predictors[output].reads[0][0]

    def predict(self, output: str, features: Sequence[torch.Tensor], level: int) -> torch.Tensor:
        """Apply one prediction layer on a level to what its predictor reads, (N, C, H, W) each: (N, A*K, H, W)."""
        return self.predictors[output].layer(*features)

    def grid(self, features: Sequence[torch.Tensor], images: ImageList) -> AnchorGrid:
        """Lay anchors over feature maps (N, C, H, W), one a level."""
        anchors = self.innermost.anchor_generator(list(features))
        return AnchorGrid.from_levels(anchors, features, self.strides, self.anchors_per_cell)

    @abstractmethod
    def assign(self, grid: AnchorGrid, truth: GroundTruth, outputs: Mapping[str, torch.Tensor]) -> Assignment:
        """Return the targets of a batch; an assigner may look at the outputs (N, R, K)."""

    @abstractmethod
    def losses(
        self, grid: AnchorGrid, outputs: Mapping[str, torch.Tensor], assignment: Assignment
    ) -> dict[str, torch.Tensor]:
        """Return the detector's losses by name; ``outputs`` are (N, R, K)."""

    def normalizer(self, grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
        """Return the number, a scalar, that the detector divides its class loss by."""
        return mean_over_processes(assignment.normalizer)

    def class_scores(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Class probabilities (..., K) of outputs (..., K); no centerness in them."""
        return outputs["logits"].sigmoid()

    def decode(self, grid: AnchorGrid, deltas: torch.Tensor) -> torch.Tensor:
        """Boxes (N, R, 4) XYXY in pixels from box outputs (N, R, box_dim), not clipped."""
        return self.decode_rows(deltas, grid.boxes, grid.stride)

    def decode_rows(
        self, deltas: torch.Tensor, anchors: torch.Tensor, strides: torch.Tensor
    ) -> torch.Tensor:
        """The same for any rows: outputs (..., box_dim) of anchors (..., 4) on levels of strides (...)."""
        # Detectron2's FCOS would decode half precision in half precision.
        deltas = deltas.float()
        anchors = anchors.expand_as(deltas).reshape(-1, 4)
        return self.innermost.box2box_transform.apply_deltas(deltas.reshape(-1, 4), anchors).view_as(deltas)

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> DenseRun:
        return DenseRun(self, images, gt_instances, taps or {}, frozen)


class DenseRun(Run):
    """A batch going through a dense detector; R are its anchors over all levels."""

    staged: StagedDense

    @stage
    def taps(self) -> dict[str, dict[Tap, list[torch.Tensor]]]:
        """branch -> place -> per level (N, C, H, W); what the predictors read and each tower's end are always there."""
        reads = [read for predictor in self.staged.predictors.values() for read in predictor.reads]
        taps: dict[str, dict[Tap, list[torch.Tensor]]] = {}
        for branch, tower in self.staged.towers.items():
            wanted = {tower.end, *self.wanted_taps.get(branch, ()), *(tap for name, tap in reads if name == branch)}
            # Level by level: norms that cycle over the levels count the calls.
            levels = [tower.run_through(x, wanted) for x in self.features.values()]
            taps[branch] = {tap: [level[tap] for level in levels] for tap in wanted}
        return taps

    @stage
    def predictions(self) -> dict[str, list[torch.Tensor]]:
        """Output name -> per level raw predictions (N, A*K, H, W)."""
        predictions = {}
        for output, predictor in self.staged.predictors.items():
            levels = zip(*(self.taps[branch][tap] for branch, tap in predictor.reads))
            predictions[output] = [self.staged.predict(output, read, level) for level, read in enumerate(levels)]
        return predictions

    @stage
    def grid(self) -> AnchorGrid:
        return self.staged.grid(list(self.features.values()), self.images)

    @stage
    def outputs(self) -> dict[str, torch.Tensor]:
        """Output name -> (N, R, K), in the order of the anchors."""
        return {output: self.grid.join(maps) for output, maps in self.predictions.items()}

    @stage
    def assignment(self) -> Assignment:
        return self.staged.assign(self.grid, self.truth, self.outputs)

    @stage
    def losses(self) -> dict[str, torch.Tensor]:
        return self.staged.losses(self.grid, self.outputs, self.assignment)


_STAGED: dict[type[nn.Module], type[StagedDetector]] = {}


def register_staged(model_class: type[nn.Module]) -> Callable[[type[StagedDetector]], type[StagedDetector]]:
    """Class decorator: this adapter runs ``model_class`` and its subclasses in stages.

    Raises:
        TypeError: the adapter does not declare its family, or leaves out what every adapter has to define.
    """

    def register(adapter: type[StagedDetector]) -> type[StagedDetector]:
        if getattr(adapter, "family", None) not in FAMILIES:
            raise TypeError(f"{adapter.__name__} must declare its family, one of {', '.join(map(repr, FAMILIES))}.")
        if adapter.__abstractmethods__:
            missing = ", ".join(sorted(adapter.__abstractmethods__))
            raise TypeError(f"{adapter.__name__} must define {missing}; see StagedDetector in d2_distill/staged.py.")
        _STAGED[model_class] = adapter
        return adapter

    return register


def list_staged() -> list[str]:
    """Return the names of the registered detectors that can be run in stages."""
    return sorted(name for name, model_class in META_ARCH_REGISTRY if adapter_of(model_class) is not None)


def adapter_of(model_class: type) -> type[StagedDetector] | None:
    """Return what runs a class of detectors in stages; None if nothing does.

    A class that overrides ``forward`` needs an adapter of its own: that of its base would run something else.
    """
    base = _registered_base(model_class)
    return _STAGED[base] if base is not None and model_class.forward is base.forward else None


def declared_adapter(model_class: type) -> type[StagedDetector] | None:
    """The adapter of a class of detectors, or of what it is derived from, even if it overrides ``forward``.

    What such a class cannot do is run in stages; its config keys are those of its base.
    """
    base = _registered_base(model_class)
    return None if base is None else _STAGED[base]


def _registered_base(model_class: type) -> type[nn.Module] | None:
    """Return the most specific class with an adapter that a class is, or is derived from."""
    bases = model_class.__mro__ if isinstance(model_class, type) else ()  # a function can be registered as well
    return next((base for base in bases if base in _STAGED), None)


def family_of(name: str) -> str | None:
    """The family of a registered meta-architecture; None if it is unknown or cannot be run in stages."""
    adapter = adapter_of(META_ARCH_REGISTRY.get(name)) if name in META_ARCH_REGISTRY else None
    return None if adapter is None else adapter.family


def stage_detector(model: nn.Module) -> StagedDetector:
    """The adapter of a detector, by its most specific registered class.

    Raises:
        UserError: no adapter is registered for it.
    """
    adapter = adapter_of(type(model))
    if adapter is not None:
        return adapter(model)
    raise UserError(
        f"{type(model).__name__} has no staged adapter, without which it can neither teach, nor be taught or exported; "
        "register one (docs/architecture.md), or choose one of "
        f"{', '.join(list_staged())} as MODEL.META_ARCHITECTURE / MODEL.DISTILL.STUDENT."
    )
