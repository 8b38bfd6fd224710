"""The staged protocol: a detector run stage by stage, each result computed once and shared by all who ask.

A :class:`StagedDetector` knows how one meta-architecture is cut into stages; a :class:`Run` is one batch
going through them. Detectors keep their own ``forward``, which equals the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, wraps
from typing import (
    Any,
    Callable,
    NamedTuple,
)

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from .assigners import Assignment, GroundTruth
from .errors import UserError
from .layers.class_outputs import keep_outputs


class stage(cached_property):
    """A field of a run, computed at the first access; without gradient if the run is frozen."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        @wraps(compute)
        def guarded(run: "Run") -> Any:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not run.frozen):
                return compute(run)

        super().__init__(guarded)


class Tap(NamedTuple):
    """A place in a tower: behind ``position`` blocks; 0 is the feature map in front of it.

    With ``activated`` False it lies in front of the activation of the last of these blocks.
    """

    position: int
    activated: bool = True


Taps = Mapping[str, frozenset[Tap]]


class Tower:
    """A head branch of n blocks (conv, norm, activation) that can be run from any tap to any later one.

    It is a view of the layers of an ``nn.Sequential``, whose state-dict names stay; each ReLU ends a block.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        self.layers = list(layers)
        self._ends = [0] + [end for end, layer in enumerate(layers, start=1) if isinstance(layer, nn.ReLU)]
        assert self._ends[-1] == len(self.layers), "a tower must end with an activation"

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def end(self) -> Tap:
        return Tap(len(self))

    def run(self, x: torch.Tensor, start: Tap = Tap(0), stop: Tap | None = None) -> torch.Tensor:
        """Feature (N, C, H, W) at the tap ``start`` to that at ``stop``, by default the tower's end."""
        for layer in self.layers[self._depth(start) : self._depth(stop or self.end)]:
            x = layer(x)
        return x

    def _depth(self, tap: Tap) -> int:
        """Number of layers in front of a tap."""
        return self._ends[tap.position] - (not tap.activated)

    def out_channels(self, position: int) -> int:
        """Channels behind ``position`` >= 1 blocks."""
        block = self.layers[self._ends[position - 1] : self._ends[position]]
        return next(layer for layer in block if isinstance(layer, nn.Conv2d)).out_channels


class StagedDetector:
    """How one meta-architecture is run in stages. Holds the model, owns no parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    @property
    def num_classes(self) -> int:
        raise NotImplementedError

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Change the model, weights included, into one that knows these of its classes only, in this order.

        What it predicts of them stays the same.
        """
        raise NotImplementedError

    @property
    def size_divisibility(self) -> int:
        """What the sides of a batch are multiples of."""
        return max(self.model.backbone.size_divisibility, 1)

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each entry of ``Run.features``, in their order."""
        raise NotImplementedError

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise and batch the images of Detectron2 dataset dicts."""
        return self.model.preprocess_image(batched_inputs)

    def features(self, images: ImageList) -> dict[str, torch.Tensor]:
        """Feature maps (N, C, H, W) that the heads read."""
        features = self.model.backbone(images.tensor)
        return {name: features[name] for name in self.feature_shapes()}

    def run(
        self,
        images: ImageList,
        gt_instances: list[Instances] | None = None,
        *,
        taps: Taps | None = None,
        frozen: bool = False,
    ) -> "Run":
        """Start a run; nothing is computed before a field of it is read.

        Args:
            images: the preprocessed batch.
            gt_instances: ground truth, one entry an image; needed by assignment and losses only.
            taps: branch name -> places in its tower whose features are kept.
            frozen: compute every stage without gradient.
        """
        raise NotImplementedError


class Run:
    """One batch going through the stages of one detector."""

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
        self.frozen = frozen

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

    Attributes:
        towers: branch name -> :class:`Tower`.
        predictors: output name -> (branch, prediction layer), in the order in which the head returns them.
        reg_max: last bin of each side's distribution; None if boxes are not predicted as distributions.
        assigns_points: whether locations are assigned by where they lie in a box, not by anchors.
        averages_normalizer: whether its losses are divided by a mean over the processes.
        atss_topk: candidates a level of a box, for its ATSS threshold.
    """

    towers: dict[str, Tower]
    predictors: dict[str, tuple[str, nn.Module]]
    reg_max: int | None = None
    assigns_points = False
    averages_normalizer = True
    atss_topk = 9

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def keep_classes(self, classes: Sequence[int]) -> None:
        _, layer = self.predictors["logits"]
        scores = layer.out_channels // self.model.anchor_generator.num_anchors[0]
        # Behind the classes may stand an output that is none (GFLv2).
        kept = [*classes, *range(self.num_classes, scores)]
        keep_outputs(layer, [start + k for start in range(0, layer.out_channels, scores) for k in kept])
        self.model.num_classes = len(classes)

    @property
    def in_features(self) -> list[str]:
        return list(self.model.head_in_features)

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        shapes = self.model.backbone.output_shape()
        return {name: shapes[name] for name in self.in_features}

    @property
    def strides(self) -> list[int]:
        """Of the levels, in pixels."""
        return [shape.stride for shape in self.feature_shapes().values()]

    def tap_channels(self, branch: str, position: int) -> int:
        """Channels of a branch behind ``position`` blocks; 0 is the feature map in front of the tower."""
        if position:
            return self.towers[branch].out_channels(position)
        return next(iter(self.feature_shapes().values())).channels

    def predict(self, output: str, feature: torch.Tensor, level: int) -> torch.Tensor:
        """Apply one prediction layer to the end of its tower on a level: (N, C, H, W) -> (N, A*K, H, W)."""
        _, layer = self.predictors[output]
        return layer(feature)

    def anchors(self, features: list[torch.Tensor]) -> list[Boxes]:
        return self.model.anchor_generator(features)

    def assign(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Assignment:
        labels, boxes = self.model.label_anchors(anchors, gt_instances)
        return Assignment(torch.stack(labels), torch.stack(boxes), self.num_classes)

    def valid_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> torch.Tensor | None:
        """(N, R) bool, False for anchors that only see padding; None if the detector makes no difference."""
        return None

    def losses(
        self, anchors: list[Boxes], outputs: dict[str, list[torch.Tensor]], assignment: Assignment
    ) -> dict[str, torch.Tensor]:
        """The detector's losses; ``outputs`` are per level (N, H*W*A, K)."""
        raise NotImplementedError

    def class_scores(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class probabilities (..., K) of outputs (..., K); no centerness in them."""
        return outputs["logits"].sigmoid()

    def decode(self, anchors: list[Boxes], deltas: torch.Tensor) -> torch.Tensor:
        """Boxes (N, R, 4) XYXY in pixels from box outputs (N, R, box_dim) of all levels, not clipped."""
        levels = zip(anchors, self.strides)
        strides = torch.cat([boxes.tensor.new_full((len(boxes),), stride) for boxes, stride in levels])
        return self.decode_rows(deltas, Boxes.cat(anchors).tensor, strides)

    def decode_rows(
        self, deltas: torch.Tensor, anchors: torch.Tensor, strides: torch.Tensor
    ) -> torch.Tensor:
        """The same for any rows: outputs (..., box_dim) of anchors (..., 4) on levels of strides (...)."""
        # Detectron2's FCOS would decode half precision in half precision.
        deltas = deltas.float()
        anchors = anchors.expand_as(deltas).reshape(-1, 4)
        return self.model.box2box_transform.apply_deltas(deltas.reshape(-1, 4), anchors).view_as(deltas)

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> "DenseRun":
        return DenseRun(self, images, gt_instances, taps or {}, frozen)


class DenseRun(Run):
    """A batch going through a dense detector."""

    staged: StagedDense

    @stage
    def taps(self) -> dict[str, dict[Tap, list[torch.Tensor]]]:
        """branch -> place -> per level (N, C, H, W); the end of each tower is always there."""
        features = list(self.features.values())
        taps: dict[str, dict[Tap, list[torch.Tensor]]] = {}
        for branch, tower in self.staged.towers.items():
            wanted = sorted(self.wanted_taps.get(branch, frozenset()) | {tower.end})
            kept: dict[Tap, list[torch.Tensor]] = {tap: [] for tap in wanted}
            # Level by level: norms that cycle over the levels count the calls.
            for x in features:
                done = Tap(0)
                for tap in wanted:
                    x = tower.run(x, done, tap)
                    kept[tap].append(x)
                    done = tap
            taps[branch] = kept
        return taps

    @stage
    def predictions(self) -> dict[str, list[torch.Tensor]]:
        """Output name -> per level raw predictions (N, A*K, H, W)."""
        ends = {branch: self.taps[branch][tower.end] for branch, tower in self.staged.towers.items()}
        return {
            output: [self.staged.predict(output, feature, level) for level, feature in enumerate(ends[branch])]
            for output, (branch, _) in self.staged.predictors.items()
        }

    @stage
    def outputs(self) -> dict[str, list[torch.Tensor]]:
        """Output name -> per level (N, H*W*A, K), in the order of the anchors."""
        return {name: self.flatten(name, maps) for name, maps in self.predictions.items()}

    @stage
    def anchors(self) -> list[Boxes]:
        """Per level, H*W*A boxes."""
        return self.staged.anchors(list(self.features.values()))

    @stage
    def valid_anchors(self) -> torch.Tensor | None:
        """(N, R) bool, see :meth:`StagedDense.valid_anchors`."""
        return self.staged.valid_anchors(self.anchors, self.gt_instances)

    @stage
    def assignment(self) -> Assignment:
        return self.staged.assign(self.anchors, self.gt_instances)

    @stage
    def losses(self) -> dict[str, torch.Tensor]:
        return self.staged.losses(self.anchors, self.outputs, self.assignment)

    def flatten(self, output: str, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (N, A*K, H, W) -> (N, H*W*A, K), a level each."""
        flat = []
        for level, x in enumerate(maps):
            images, channels, height, width = x.shape
            num_anchors = len(self.anchors[level]) // (height * width)
            x = x.view(images, num_anchors, channels // num_anchors, height, width)
            flat.append(x.permute(0, 3, 4, 1, 2).reshape(images, -1, channels // num_anchors))
        return flat


_STAGED: dict[type[nn.Module], type[StagedDetector]] = {}


def register_staged(model_class: type[nn.Module]) -> Callable[[type[StagedDetector]], type[StagedDetector]]:
    """Class decorator: this adapter runs ``model_class`` and its subclasses in stages."""

    def register(adapter: type[StagedDetector]) -> type[StagedDetector]:
        _STAGED[model_class] = adapter
        return adapter

    return register


def list_staged() -> list[str]:
    """Names of the detectors that can be run in stages."""
    return sorted(model_class.__name__ for model_class in _STAGED)


def adapter_of(model_class: type) -> type[StagedDetector] | None:
    """What runs a class of detectors in stages, if anything does."""
    for base in model_class.__mro__:
        if base in _STAGED:
            return _STAGED[base]
        if "forward" in vars(base):  # the adapter of what it overrides would run something else
            return None
    return None


def stage_detector(model: nn.Module) -> StagedDetector:
    """The adapter of a detector, by its most specific registered class.

    Raises:
        UserError: no adapter is registered for it.
    """
    adapter = adapter_of(type(model))
    if adapter is not None:
        return adapter(model)
    raise UserError(
        f"{type(model).__name__} cannot be distilled: it has no staged adapter; "
        f"choose one of {', '.join(list_staged())} as MODEL.META_ARCHITECTURE / MODEL.DISTILL.STUDENT."
    )
