"""Conformance of every staged adapter: the stages are the detector, no more and no less."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.detectors import MultiScaleDetector, TowerDetector
from d2_distill.errors import UserError
from d2_distill.layers.tower import Tap
from d2_distill.staged import (
    StagedDense,
    StagedDetector,
    adapter_of,
    list_staged,
    register_staged,
    stage,
    stage_detector,
)

from .small_detectors import CASES, ONE_STAGE, all_taps, batch, build, detector_cfg


@pytest.fixture(scope="module")
def models():
    """One untrained detector a case; tests that change it take a copy."""
    return {case: build(detector_cfg(case), salt=2).train() for case in CASES}


@pytest.fixture(params=CASES)
def model(request, models) -> nn.Module:
    return copy.deepcopy(models[request.param])


@pytest.fixture(params=ONE_STAGE)
def dense(request, models) -> StagedDense:
    return stage_detector(copy.deepcopy(models[request.param]).eval())


def start(staged, **kwargs):
    inputs = batch()
    return staged.run(staged.preprocess(inputs), [x["instances"] for x in inputs], **kwargs)


def read_all(run) -> dict:
    """Every stage of the run, by name."""
    names = [name for name in dir(type(run)) if isinstance(getattr(type(run), name), stage)]
    return {name: getattr(run, name) for name in names}


def tensors_in(value) -> list:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, (list, tuple)):  # Boxes, Instances, Assignment
        value = list((value.get_fields() if hasattr(value, "get_fields") else vars(value)).values())
    parts = [part for part in value if part is not None and not isinstance(part, (int, float))]
    return [tensor for part in parts for tensor in tensors_in(part)]


def final_scores(staged: StagedDense, outputs) -> torch.Tensor:
    """What the detector ranks its detections by, (..., num_classes)."""
    scores = staged.class_scores(outputs)[..., : staged.num_classes]
    if isinstance(staged.innermost, TowerDetector):
        return staged.innermost.final_scores(scores, outputs)
    return (scores * outputs["centerness"].sigmoid()).sqrt() if "centerness" in outputs else scores


def seeded(compute):
    """Result of a training step's forward from a fixed random state, and the random state that it leaves."""
    torch.manual_seed(3)
    with EventStorage():
        result = compute()
    return result, torch.get_rng_state()


def count_calls(model: nn.Module) -> Counter:
    """Counts from now on how often each layer runs."""
    calls: Counter = Counter()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_every_adapter_has_a_case():
    adapters = {name: adapter_of(META_ARCH_REGISTRY.get(name)) for name in list_staged()}
    cases = {case.split()[0] for case in CASES}
    assert set(adapters.values()) <= {adapters[name] for name in cases}


def test_stages_compose_to_forward(model):
    ours = copy.deepcopy(model)
    expected, random_state = seeded(lambda: model(batch()))
    losses, our_random_state = seeded(lambda: start(stage_detector(ours)).losses)
    assert list(losses) == list(expected) and all(loss > 0 for loss in losses.values())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert torch.equal(our_random_state, random_state)
    for total in (sum(expected.values()), sum(losses.values())):
        total.backward()
    for (name, theirs), parameter in zip(model.named_parameters(), ours.parameters()):
        assert theirs.grad is not None and torch.equal(parameter.grad, theirs.grad), name
    for (name, theirs), buffer in zip(model.named_buffers(), ours.buffers()):
        assert torch.equal(buffer, theirs), name
    assert getattr(ours, "loss_normalizer", None) == getattr(model, "loss_normalizer", None)


def test_other_readers_change_nothing(model):
    """Taps, and fields read before the losses, leave losses and random numbers as they are."""
    ours = copy.deepcopy(model)
    expected, random_state = seeded(lambda: model(batch()))
    staged = stage_detector(ours)
    fields, our_random_state = seeded(lambda: read_all(start(staged, taps=all_taps(staged))))
    assert all(torch.equal(fields["losses"][name], loss) for name, loss in expected.items())
    assert torch.equal(our_random_state, random_state)


def test_evaluation_is_untouched(model):
    names, plain = list(model.state_dict()), copy.deepcopy(model).eval()
    run = start(stage_detector(model.eval()), frozen=True)
    assert run.features
    assert list(model.state_dict()) == names
    for ours, theirs in zip(model(batch()), plain(batch())):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) > 0 and torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.pred_classes, theirs.pred_classes)


def test_each_stage_is_computed_once(model):
    plain = copy.deepcopy(model)
    calls, expected = count_calls(model), count_calls(plain)
    staged = stage_detector(model)
    run = start(staged, taps=all_taps(staged))
    seeded(lambda: plain(batch()))
    first, _ = seeded(lambda: read_all(run))
    again = read_all(run)
    assert all(again[name] is field for name, field in first.items())
    assert calls == expected
    if isinstance(staged, StagedDense):
        several = isinstance(model, MultiScaleDetector)
        head, times = ("detector.head", 3) if several else ("head", 1)
        assert calls[f"{head}.cls_score"] == calls[f"{head}.bbox_pred"] == times * len(run.features) == times * 3


def test_frozen_run_carries_no_gradient(model):
    staged = stage_detector(model)
    fields, _ = seeded(lambda: read_all(start(staged, taps=all_taps(staged), frozen=True)))
    found = tensors_in(fields)
    assert len(found) > 3 and not any(tensor.requires_grad for tensor in found)
    assert torch.is_grad_enabled() and start(staged).features["p3"].requires_grad
    with torch.no_grad():
        assert not start(staged).features["p3"].requires_grad


def test_feature_shapes(model):
    staged = stage_detector(model)
    run, shapes = start(staged), staged.feature_shapes()
    assert list(run.features) == list(shapes)
    assert [shape.stride for shape in shapes.values()] == sorted(shape.stride for shape in shapes.values())
    padded = 128 if isinstance(model, MultiScaleDetector) else 96
    for name, feature in run.features.items():
        side = padded // shapes[name].stride
        assert feature.shape == (2, shapes[name].channels, side, side)
    assert staged.num_classes == 3


def test_taps_are_pieces_of_the_tower(dense):
    """Against the head's own layers: behind k blocks is behind the k-th activation, or just in front of it."""
    head = dense.innermost.head
    shared = dense.kind == "TOOD"
    subnets = {"shared": head.subnet} if shared else {"cls": head.cls_subnet, "box": head.bbox_subnet}
    assert set(dense.towers) == set(subnets)
    run = start(dense, taps=all_taps(dense), frozen=True)
    features = list(run.features.values())
    for branch, subnet in subnets.items():
        tower = dense.towers[branch]
        activations = [index for index, layer in enumerate(subnet) if isinstance(layer, nn.ReLU)]
        assert len(tower) == len(activations) == 2
        ends = {Tap(0): 0, **{Tap(k, False): index for k, index in enumerate(activations, start=1)}}
        ends.update({Tap(k): index + 1 for k, index in enumerate(activations, start=1)})
        assert set(run.taps[branch]) == set(ends)
        for tap, end in ends.items():
            # A per-level norm takes its levels in turn, so each piece runs over all of them.
            front = [subnet[:end](x) for x in features]
            for kept, x in zip(run.taps[branch][tap], front):
                assert torch.equal(kept, x) and x.shape[1] == dense.tap_channels(branch, tap.position)
            whole = [tower.run(x, tap) for x in front]
            assert all(torch.equal(x, y) for x, y in zip(whole, run.taps[branch][tower.end]))
            assert all(torch.equal(tower.run(x, stop=tap), y) for x, y in zip(features, front))


def test_only_wanted_taps_are_kept(dense):
    read = {tap for predictor in dense.predictors.values() for _, tap in predictor.reads}
    assert read == ({Tap(1), Tap(2)} if dense.kind == "TOOD" else {Tap(2)})
    assert all(set(taps) == read for taps in start(dense, frozen=True).taps.values())
    branch = dense.branch_of("deltas")
    taps = start(dense, taps={branch: frozenset({Tap(0)})}, frozen=True).taps
    assert {name: set(kept) for name, kept in taps.items()} == {
        name: read | ({Tap(0)} if name == branch else set()) for name in dense.towers
    }


def test_outputs_are_in_the_order_of_the_anchors(dense):
    """Cell by cell, row by row, and within a cell anchor by anchor."""
    run, strides = start(dense, frozen=True), [shape.stride for shape in dense.feature_shapes().values()]
    # GFLv2 has one class output too many.
    detector = dense.innermost
    box_dim = detector.box_coder.box_dim if isinstance(detector, TowerDetector) else 4
    widths = {"logits": 4 if dense.kind == "GFLv2" else 3, "deltas": box_dim, "centerness": 1}
    assert set(run.outputs) == set(dense.predictors) <= set(widths)
    grid = run.grid
    levels = {name: grid.split(output) for name, output in run.outputs.items()}
    for level, (anchors, stride) in enumerate(zip(grid.level_boxes(), strides)):
        side = run.images.tensor.shape[-1] // stride
        per_cell = len(anchors) // side**2
        assert (grid.map_sizes[level], grid.strides[level], grid.anchors_per_cell) == ((side, side), stride, per_cell)
        centers = anchors.get_centers()
        cells = [(y, x, a) for y in range(side) for x in range(side) for a in range(per_cell)]
        offset = dense.innermost.anchor_generator.offset
        expected = torch.tensor([[(x + offset) * stride, (y + offset) * stride] for y, x, _ in cells])
        torch.testing.assert_close(centers, expected)
        for name, flat in levels.items():
            width, maps = widths[name], run.predictions[name][level]
            assert maps.shape[1] == per_cell * width
            slow = torch.stack([maps[:, a * width : (a + 1) * width, y, x] for y, x, a in cells], dim=1)
            assert torch.equal(flat[level], slow), name


def test_decoded_outputs_contain_the_detections(dense):
    """Each detection of the model's own inference is one of the decoded boxes, with its score and class."""
    run = start(dense, frozen=True)
    scores = final_scores(dense, run.outputs)
    decoded = dense.decode(run.grid, run.outputs["deltas"])
    for index, (detections, size) in enumerate(zip(dense.model(batch()), run.images.image_sizes)):
        detections = detections["instances"]
        boxes = Boxes(decoded[index].clone())
        boxes.clip(size)
        assert len(detections) > 0
        ours = scores[index][:, detections.pred_classes].T  # (detections, R)
        distance = (detections.pred_boxes.tensor[:, None] - boxes.tensor).abs().amax(dim=2)
        assert (distance + (ours - detections.scores[:, None]).abs()).amin(dim=1).max() < 1e-3


def test_a_detector_without_adapter_is_refused():
    with pytest.raises(UserError, match=f"Linear has no staged adapter.*choose one of {', '.join(list_staged())} as"):
        stage_detector(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "base, declared, message",
    [
        (StagedDetector, {}, "Mine must declare its family, one of 'dense', 'two-stage', 'query'"),
        (StagedDense, {"family": "anchors"}, "Mine must declare its family"),
        (StagedDense, {}, "Mine must define assign, losses, num_classes_key; see StagedDetector"),
        (StagedDetector, {"family": "query"}, "Mine must define feature_shapes, num_classes, num_classes_key, run;"),
    ],
)
def test_an_adapter_that_leaves_something_out_is_refused(base, declared, message):
    with pytest.raises(TypeError, match=message):
        register_staged(nn.Linear)(type("Mine", (base,), declared))
    assert adapter_of(nn.Linear) is None


def test_the_first_reader_does_not_decide_about_the_gradient(model):
    """A stage that is first read without gradient has it all the same, and one of a frozen run has none."""
    staged = stage_detector(model)
    with EventStorage():
        run, frozen = start(staged), start(staged, frozen=True)
        with torch.no_grad():
            losses = run.losses
            without = start(staged)
        assert all(feature.requires_grad for feature in run.features.values())
        assert all(loss.requires_grad for loss in losses.values())
        assert not any(loss.requires_grad for run in (frozen, without) for loss in run.losses.values())
