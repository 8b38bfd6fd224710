"""The project's one-stage detectors: training on difficult batches, targets, normalizers and inference."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing
from torchvision.ops import batched_nms

from d2_distill.detectors import TowerDetector
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector

from ..same_detections import assert_same_detections
from ..small_detectors import CASES, batch, build, detector_cfg, image_input

DETECTORS = ("ATSS", "GFL", "GFLv2", "OpenMMLabFCOS", "OpenMMLabRetinaNet", "TOOD")
ONE_STAGE = [case for case in CASES if case.split()[0] in DETECTORS]

BATCHES = {
    "no boxes": [image_input(64, 96), image_input(96, 64, seed=1)],
    "one image without": [image_input(64, 96), *batch()],
    "single pixels": [image_input(96, 96, [[40, 40, 41, 41], [95, 0, 96, 1]], [1, 2])],
    "no area": [image_input(96, 96, [[40, 40, 40, 40], [30, 8, 30, 50]], [1, 0])],
    "no positive": [image_input(96, 96, [[41.1, 41.2, 41.3, 41.4]], [1])],
    "whole image": [image_input(96, 64, [[0, 0, 64, 96]] * 2, [1, 2])],
    "few cells": [image_input(32, 64, [[4, 4, 24, 24]], [1])],
}


@pytest.fixture(scope="module")
def models() -> dict[str, TowerDetector]:
    """Not to be changed."""
    return {case: build(detector_cfg(case), salt=2).train() for case in ONE_STAGE}


@pytest.fixture(params=ONE_STAGE)
def model(request, models) -> TowerDetector:
    return models[request.param]


def with_fixed_targets(model: TowerDetector) -> TowerDetector:
    """The model, or one whose targets do not depend on what it predicts, as TOOD's do after its first iterations."""
    if model.assigner.reads_predictions:
        model = copy.deepcopy(model)
        model.assigner = model.assigner.initial
    return model


def losses_of(model, inputs) -> dict[str, torch.Tensor]:
    with EventStorage():
        return model(inputs)


def run_of(model, inputs):
    return stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])


@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
def test_difficult_batches(model, inputs):
    """Losses and gradients are finite, and no parameter is left without a gradient."""
    losses = losses_of(model, inputs)
    assert losses["loss_cls"] > 0 and all(loss.isfinite() for loss in losses.values())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses.values()), parameters.values(), allow_unused=True)
    for name, gradient in zip(parameters, gradients):
        assert gradient is not None and gradient.isfinite().all(), name
    if not run_of(model, inputs).assignment.foreground.any():
        assert not any(loss for name, loss in losses.items() if name != "loss_cls")


@pytest.mark.parametrize("name, expected", [("no boxes", False), ("no area", False), ("whole image", True)])
def test_positives_of_difficult_batches(model, name, expected):
    assert run_of(model, BATCHES[name]).assignment.foreground.any() == expected


def test_a_bfloat16_head_loses_little(model):
    """Losses are taken in float32, whatever autocast makes of the head."""
    model = with_fixed_targets(model)
    expected = losses_of(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        for name, loss in losses_of(model, batch()).items():
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0)


def test_a_batch_of_copies_costs_what_one_costs(model):
    """Losses depend neither on the number of images nor on earlier batches."""
    model = with_fixed_targets(model)
    one = batch()[:1]
    expected = losses_of(model, one)
    for name, loss in losses_of(model, one * 3).items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["ATSS", "GFL", "GFLv2", "OpenMMLabFCOS"])
def test_floor_of_the_box_normalizer(models, case):
    """Above the sum of the weights it takes its place."""
    model = copy.deepcopy(models[case])
    expected = losses_of(model, batch())
    found = {}
    for floor in (1e-3, 1e5, 2e5):
        model.criterion = dataclasses.replace(model.criterion, normalizer_floor=floor)
        found[floor] = losses_of(model, batch())
    for name in ("loss_box_reg", "loss_dfl") if "GFL" in case else ("loss_box_reg",):
        assert found[1e-3][name] == expected[name] > 10 * found[1e5][name] > 0
        torch.testing.assert_close(found[1e5][name], 2 * found[2e5][name])
    assert all(losses["loss_cls"] == expected["loss_cls"] for losses in found.values())


def _as_one_of_two(rank: int, model: TowerDetector, images: list[dict], folder: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    losses = losses_of(model, images[rank::2])
    torch.save({name: loss.detach() for name, loss in losses.items()}, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["ATSS", "GFL", "GFLv2", "OpenMMLabFCOS", "TOOD"])
def test_two_processes_train_like_one(models, case, tmp_path):
    """The mean over processes, which DDP takes of the gradients, is the loss of the whole batch."""
    images = [
        image_input(64, 96, [[4, 4, 40, 44], [50, 10, 90, 60]], [0, 2]),
        image_input(64, 96, [[16, 10, 30, 30]], [1], seed=1),
        image_input(64, 96, [[40, 8, 90, 60]], [1], seed=2),
        image_input(64, 96, [[0, 0, 95, 63]], [0], seed=3),
    ]
    model = with_fixed_targets(models[case])
    arguments = (model, images, str(tmp_path))
    multiprocessing.start_processes(_as_one_of_two, arguments, nprocs=2, start_method="fork")
    halves = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    for name, whole in losses_of(model, images).items():
        assert not torch.isclose(halves[0][name], halves[1][name], rtol=1e-3)
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, whole, rtol=1e-4, atol=1e-6)


def test_padding_changes_no_target(model):
    """What an image trains does not depend on the images that it shares a batch with."""
    model = with_fixed_targets(model)
    small = image_input(50, 62, [[4, 4, 40, 44], [20, 6, 34, 20]], [1, 2])
    large = image_input(160, 192, [[8, 8, 150, 140]], [0])
    alone, together = run_of(model, [small]), run_of(model, [large, small])
    assert alone.assignment.foreground.any() and together.assignment.foreground[0].any()

    def rows(run):
        """(level, anchor) -> label and box, of the last image."""
        keys = [(level, *box) for level, boxes in enumerate(run.grid.level_boxes()) for box in boxes.tensor.tolist()]
        values = zip(run.assignment.labels[-1].tolist(), run.assignment.boxes[-1].tolist())
        return dict(zip(keys, values))

    alone, together = rows(alone), rows(together)
    assert set(alone) < set(together)
    for key, (label, box) in alone.items():
        assert together[key][0] == label
        assert label in (-1, 3) or together[key][1] == box
    # The rest are cells of padding.
    rest = {label for key, (label, _) in together.items() if key not in alone}
    assert rest == ({-1} if model.ignores_padding else {3})


def slow_inference(model, outputs, anchors, strides, size) -> Instances:
    """Detections of one image from outputs (R_l, K), location by location."""
    boxes, scores, classes = [], [], []
    for level, stride in enumerate(strides):
        of_level = {name: levels[level] for name, levels in outputs.items()}
        class_scores = model.class_scores(of_level)[:, :3]
        ranked = class_scores
        if "centerness" in of_level:
            ranked = ranked * of_level["centerness"].sigmoid()
        decoded = model.box_coder.decode(
            of_level["deltas"], anchors[level].tensor, torch.full((len(ranked),), float(stride))
        )
        decoded = Boxes(decoded)
        decoded.clip(size)
        order = sorted(range(len(ranked)), key=lambda row: -max(ranked[row].tolist()))
        for row in order[: model.test_topk_candidates]:
            for index in range(3):
                if class_scores[row, index] > model.test_score_thresh:
                    boxes.append(decoded.tensor[row])
                    scores.append(ranked[row, index])
                    classes.append(index)
    boxes, scores, classes = torch.stack(boxes), torch.stack(scores), torch.tensor(classes)
    keep = batched_nms(boxes, scores, classes, model.test_nms_thresh)[: model.max_detections_per_image]
    return Instances(size, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=classes[keep])


@pytest.mark.parametrize("topk, thresh", [(1000, 0.05), (7, 0.12), (1000, 1.0)])
def test_inference_against_a_loop(model, topk, thresh):
    """Including an empty result, where no class score is above the threshold."""
    model = copy.deepcopy(model).eval()
    model.test_topk_candidates, model.test_score_thresh = topk, thresh
    model.max_detections_per_image = 30
    inputs = batch()
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        predictions = model.head(features)
        found = model.forward_inference(images, features, predictions)
    maps = dict(zip(model.head.predictors, predictions))
    anchors, strides = model.anchor_generator(features), [8, 16, 32]
    per_cell = len(anchors[0]) // features[0][0, 0].numel()
    for index, (detections, size) in enumerate(zip(found, [(64, 96), (96, 64)])):
        outputs = {
            name: [x[index].unflatten(0, (per_cell, -1)).permute(2, 3, 0, 1).flatten(0, 2) for x in levels]
            for name, levels in maps.items()
        }
        assert (len(detections) == 0) == (thresh == 1.0)
        if thresh < 1:
            assert_same_detections(detections, slow_inference(model, outputs, anchors, strides, size))


def test_the_threshold_is_on_the_class_score_alone():
    """Candidates are ranked by both; a detection that centerness takes below the threshold stays."""
    model = build(detector_cfg("ATSS", ATSS__SCORE_THRESH_TEST=0.5, ATSS__TOPK_CANDIDATES_TEST=1)).eval()
    logits, deltas = torch.full((1, 3, 2, 2), -9.0), torch.zeros(1, 4, 2, 2)
    centerness = torch.full((1, 1, 2, 2), -2.0)
    logits[0, 1, 0, 0] = 1.0
    logits[0, 2, 1, 1], centerness[0, 0, 1, 1] = 0.9, -1.0
    predictions = [[x] * 3 for x in (logits, deltas, centerness)]
    images = ImageList.from_tensors([torch.zeros(3, 96, 96)])
    (found,) = model.forward_inference(images, [logits] * 3, predictions)
    assert found.pred_classes.tolist() == [2, 2, 2]  # one a level
    expected = torch.tensor(0.9).sigmoid() * torch.tensor(-1.0).sigmoid()
    assert expected < 0.5
    torch.testing.assert_close(found.scores, expected.expand(3))


@pytest.mark.parametrize("case", ["ATSS", "FCOS", "GFL", "OpenMMLabFCOS", "OpenMMLabRetinaNet", "TOOD"])
def test_an_unknown_feature(case):
    family = case.replace("OpenMMLab", "").upper()
    message = f"MODEL.{family}.IN_FEATURES has 'p9', .*narrow_resnet_fpn_backbone lacks; choose from .*p5"
    with pytest.raises(UserError, match=message):
        build(detector_cfg(case, **{f"{family}__IN_FEATURES": ["p3", "p4", "p9"]}))


@pytest.mark.parametrize("case", ["ATSS", "GFL", "OpenMMLabFCOS", "OpenMMLabRetinaNet", "TOOD"])
def test_an_unknown_box_loss(case):
    family = case.replace("OpenMMLab", "").upper()
    key = "BBOX_REG_LOSS_TYPE" if family == "RETINANET" else "BOX_LOSS"
    message = f"MODEL.{family}.{key} is 'l2'; choose from .*giou, iou, linear_iou, diou, ciou"
    with pytest.raises(UserError, match=message):
        build(detector_cfg(case, **{f"{family}__{key}": "l2"}))


@pytest.mark.parametrize("loss", ["giou", "iou", "linear_iou", "diou", "ciou"])
@pytest.mark.parametrize("case", ["ATSS", "GFL", "OpenMMLabFCOS", "OpenMMLabRetinaNet"])
def test_every_box_loss_falls(case, loss):
    """A small step of the box branch against its gradient lowers it."""
    family = case.replace("OpenMMLab", "").upper()
    key = "BBOX_REG_LOSS_TYPE" if family == "RETINANET" else "BOX_LOSS"
    model = build(detector_cfg(case, **{f"{family}__{key}": loss}), salt=2).train()
    before = losses_of(model, batch())["loss_box_reg"]
    before.backward()
    gradients = {p: p.grad for name, p in model.named_parameters() if name.startswith("head.bbox")}
    step = 1e-3 * before.item() / sum(gradient.square().sum() for gradient in gradients.values())
    with torch.no_grad():
        for parameter, gradient in gradients.items():
            parameter -= step * gradient
        after = losses_of(model, batch())["loss_box_reg"]
    assert 0 < after < before
