"""TOOD: its head against the layers one by one, both kinds of targets, and the losses of each."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import deform_conv2d

from d2_distill.assigners import ATSSAssigner, TaskAlignedAssigner
from d2_distill.detectors.task_aligned_head import TaskAlignedHead, move_sides
from d2_distill.errors import UserError
from d2_distill.staged import Tap, stage_detector

from ..small_detectors import batch, build, detector_cfg, image_input

LEVELS = 5
NO_BOXES = [image_input(64, 96), image_input(96, 64, seed=1)]


def head_of(channels: int = 32, blocks: int = 3, **options) -> TaskAlignedHead:
    shapes = [ShapeSpec(channels=channels, stride=8 * 2**level) for level in range(LEVELS)]
    arguments = {"num_classes": 3, "conv_dims": [channels] * blocks, "norm": "GN", **options}
    return TaskAlignedHead(input_shape=shapes, **arguments)


def run_of(model, inputs):
    return stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])


@pytest.fixture(scope="module")
def model():
    """Not to be changed. Targets are ATSS's before iteration 10."""
    return build(detector_cfg("TOOD", TOOD__INITIAL_ITERS=10), salt=2).train()


def test_published_parameter_count():
    """On COCO, of the released code's layers."""
    tower = 6 * (256 * 256 * 9 + 2 * 256)
    decomposition = (6 * 256 * 32 + 32) + (32 * 6 + 6) + 6 * 256 * 256 + 2 * 256
    predictors = (256 * 80 * 9 + 80) + (256 * 4 * 9 + 4) + LEVELS
    alignment = 2 * (6 * 256 * 64 + 64) + (64 * 9 + 1) + (64 * 8 * 9 + 8)
    head = head_of(256, 6, num_classes=80)
    assert sum(p.numel() for p in head.parameters()) == tower + 2 * decomposition + predictors + alignment == 4_823_790


def test_initial_values():
    torch.manual_seed(0)
    head = head_of(64, prior_prob=0.02)
    for name, value in head.state_dict().items():
        narrow = "attention" in name or "bbox_alignment" in name
        if name in ("cls_score.bias", "cls_alignment.2.bias"):
            assert value.tolist() == pytest.approx([math.log(0.02 / 0.98)] * len(value))
        elif value.dim() >= 2:
            spread = 4 / (2 * value.numel()) ** 0.5
            assert value.std().item() == pytest.approx(0.001 if narrow else 0.01, rel=spread), name
        elif name.endswith("bias"):
            assert not value.any()
        else:  # group norms and scales
            assert (value == 1).all()
    logits, deltas = head([torch.randn(1, 64, 8, 8)] * LEVELS)
    assert logits[0].sigmoid().mean().item() == pytest.approx(0.02, rel=0.2)
    assert deltas[0][..., 1:-1, 1:-1].mean().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("norm", ["GN", ""])
def test_forward(norm):
    """Against the layers one by one, with boxes in cells that a deformable convolution reads."""
    torch.manual_seed(1)
    head = head_of(32, 3, norm=norm)
    for name, parameter in head.named_parameters():
        nn.init.normal_(parameter, std=0.1)
    features = [torch.randn(2, 32, 6 - level, 7 - level) for level in range(LEVELS)]
    outputs = dict(zip(head.predictors, head(features)))
    assert list(outputs) == ["logits", "deltas"]
    block = 3 if norm else 2
    for level, x in enumerate(features):
        blocks = []
        for start in range(0, 3 * block, block):
            x = head.subnet[start : start + block](x)
            blocks.append(x)
        x = torch.cat(blocks, dim=1)
        of_class = head.cls_score(head.cls_decomposition(x)).sigmoid()
        mean = (of_class * head.cls_alignment(x).sigmoid()).sqrt()
        torch.testing.assert_close(outputs["logits"][level].sigmoid(), mean)

        distances = head.scales[level].scale * head.bbox_pred(head.bbox_decomposition(x)).exp()
        height, width = x.shape[-2:]
        cells = torch.stack([torch.arange(width).expand(height, -1), torch.arange(height)[:, None].expand(-1, width)])
        sides = torch.cat([cells - distances[:, :2], cells + distances[:, 2:]], dim=1)
        read = deform_conv2d(sides, head.bbox_alignment(x), torch.ones(4, 1, 1, 1))
        read = torch.cat([read[:, :2], read[:, 2:].maximum(read[:, :2])], dim=1)
        deltas = outputs["deltas"][level]
        found = torch.cat([cells - deltas[:, :2], cells + deltas[:, 2:]], dim=1)
        torch.testing.assert_close(found, read, rtol=1e-4, atol=1e-4)
        assert deltas.shape == (2, 4, height, width)


def test_predictors_read_all_blocks():
    head = head_of(blocks=4)
    reads = tuple(("shared", Tap(position)) for position in (1, 2, 3, 4))
    assert {name: predictor.reads for name, predictor in head.predictors.items()} == {"logits": reads, "deltas": reads}


def test_a_box_that_all_cells_agree_on_stays():
    height, width = 6, 8
    ys, xs = torch.arange(height)[:, None].expand(-1, width), torch.arange(width).expand(height, -1)
    distances = torch.stack([xs + 2.0, ys + 1.0, 9.0 - xs, 8.0 - ys])[None]
    offsets = torch.rand(1, 8, height, width) * 2 - 1
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(move_sides(distances, offsets)[inner], distances[inner], rtol=0, atol=1e-4)


def test_no_box_has_a_negative_size():
    torch.manual_seed(2)
    distances, offsets = torch.rand(2, 4, 5, 6) * 3, torch.randn(2, 8, 5, 6) * 6
    left, top, right, bottom = move_sides(distances, offsets).unbind(dim=1)
    for size in (left + right, top + bottom):
        assert (size > -1e-5).all() and (size < 1e-5).any() and (size > 1).any()


def test_outputs_are_float32_under_autocast():
    head = head_of()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head([torch.randn(1, 32, 4, 4)] * LEVELS)
    assert {x.dtype for levels in outputs for x in levels} == {torch.float32}


# Targets.


def test_targets_follow_the_trainers_iteration(model):
    """Whatever ran before: a resumed run goes on with those of its iteration."""
    run = run_of(model, batch())
    outputs, truth = run.outputs, run.truth
    for iteration in (0, 9, 10, 500, 3):
        with EventStorage(iteration):
            assigner = model.assigner.current()
            assignment = model.assign(run.grid, truth, outputs)
        assert isinstance(assigner, ATSSAssigner if iteration < 10 else TaskAlignedAssigner)
        assert (assignment.scores is None) == (assignment.thresholds is not None) == (iteration < 10)
    assert model.assign(run.grid, truth, outputs).scores is not None  # without a trainer


def test_targets_come_from_the_predictions(model):
    """An anchor that scores its object low has a low target, and no gradient flows through the targets."""
    with EventStorage(10):
        run = run_of(model, batch())
        before = run.assignment
        outputs = {name: x.detach().clone() for name, x in run.outputs.items()}
        image, anchor = (index[0].item() for index in before.positives)
        outputs["logits"][image, anchor] = -30.0
        after = model.assign(run.grid, run.truth, outputs)
    assert before.foreground[image, anchor]
    assert not after.foreground[image, anchor] or after.scores[image, anchor] < 0.1 * before.scores[image, anchor]
    assert not before.scores.requires_grad and not before.labels.requires_grad
    assert ((before.scores > 0) <= before.foreground).all() and before.scores.max() <= 1


def test_the_assigner_has_the_configured_options():
    options = {"TOPK": 5, "ALIGNMENT_ALPHA": 0.5, "ALIGNMENT_BETA": 2.0, "ATSS_TOPK": 3, "INITIAL_ITERS": 7}
    built = build(detector_cfg("TOOD", **{f"TOOD__{key}": value for key, value in options.items()}))
    assert built.assigner.later == TaskAlignedAssigner(topk=5, alpha=0.5, beta=2.0)
    assert (built.assigner.initial, built.assigner.iterations) == (ATSSAssigner(3), 7)
    staged = stage_detector(built)
    assert staged.assigns_by_outputs and not staged.assigns_points and staged.reg_max is None


# Losses.


def slow_giou_loss(box, other):
    def area(left, top, right, bottom):
        return max(right - left, 0) * max(bottom - top, 0)

    inner = area(*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:]))
    hull = area(*map(min, box[:2], other[:2]), *map(max, box[2:], other[2:]))
    union = area(*box) + area(*other) - inner
    return 1 - inner / union + (hull - union) / hull


def slow_centerness(x, y, box):
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


@pytest.mark.parametrize("iteration", [0, 10])
def test_losses_against_loops(model, iteration):
    """Anchor by anchor in float64."""
    with EventStorage(iteration):
        run = run_of(model, batch())
        losses = run.losses
    grid, assignment = run.grid, run.assignment
    decoded = run.staged.decode(grid, run.outputs["deltas"]).tolist()
    probabilities = run.outputs["logits"].double().sigmoid().tolist()
    of_class = of_box = targets = weights = 0.0
    for image, labels in enumerate(assignment.labels.tolist()):
        for anchor, label in enumerate(labels):
            if label < 0:
                continue
            target = weight = 0.0
            if label < 3:
                box = assignment.boxes[image, anchor].tolist()
                target, weight = 1.0, slow_centerness(*grid.centers[anchor].tolist(), box)
                if iteration == 10:
                    target = weight = assignment.scores[image, anchor].item()
                of_box += weight * slow_giou_loss(decoded[image][anchor], box)
            targets, weights = targets + target, weights + weight
            for index, p in enumerate(probabilities[image][anchor]):
                y = target if index == label else 0.0
                entropy = -y * math.log(p) - (1 - y) * math.log(1 - p)
                factor = 1.0 if iteration == 10 else 0.25 if index == label else 0.75
                of_class += factor * entropy * abs(p - y) ** 2
    assert list(losses) == ["loss_cls", "loss_box_reg"] and targets > 0 and weights > 0
    assert losses["loss_cls"].item() == pytest.approx(of_class / max(targets, 1), rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(2 * of_box / max(weights, 1), rel=1e-4)
    normalizer = run.staged.normalizer(grid, assignment)
    assert normalizer.item() == pytest.approx(max(targets, 1), rel=1e-5)


@pytest.mark.parametrize("inputs", [batch(), NO_BOXES], ids=["boxes", "no boxes"])
@pytest.mark.parametrize("iteration", [0, 10])
def test_every_parameter_learns(model, inputs, iteration):
    """No process of several waits for a gradient, in neither phase."""
    ours = copy.deepcopy(model)
    with EventStorage(iteration):
        losses = ours(inputs)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    if len(inputs[0]["instances"]):
        # A level may be without positives.
        layers = {name: p for name, p in ours.head.named_parameters() if "scales" not in name}
        assert all(p.grad.any() for p in layers.values())


@pytest.mark.parametrize("key", ["NUM_CONVS", "TOPK", "ATSS_TOPK"])
def test_what_is_refused(key):
    with pytest.raises(UserError, match=f"MODEL.TOOD.{key} is 0; it must be at least 1"):
        build(detector_cfg("TOOD", **{f"TOOD__{key}": 0}))
