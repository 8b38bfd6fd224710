"""RoI heads in stages: their own losses, RoI vectors and the steps of a cascade against slow forms, empty inputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import box_iou, roi_align

from d2_distill import provider
from d2_distill.detectors.roi_heads import RoIOutputs, RoIStage, StagedRoIHeads
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector

from ..golden.cases import fill_parameters
from ..small_detectors import batch, build, detector_cfg

STANDARD, CASCADE = "GeneralizedRCNN", "GeneralizedRCNN cascade"
SIZES = [(96, 128), (128, 112)]
SHAPES = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(2, 6)}


def make_heads(case: str, **overrides):
    """RoI heads with 24 samples an image, in training; gt boxes are added to the proposals."""
    overrides = {"ROI_HEADS__BATCH_SIZE_PER_IMAGE": 24, "ROI_BOX_HEAD__POOLER_RESOLUTION": 3, **overrides}
    cfg = detector_cfg(case, **overrides)
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, SHAPES)
    fill_parameters(heads, salt=4)
    return heads.train()


def make_features(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(2, 8, 128 // shape.stride, 128 // shape.stride, generator=generator).requires_grad_()
        for name, shape in SHAPES.items()
    }


def random_boxes(count: int, size, generator) -> torch.Tensor:
    limits = torch.tensor([size[1], size[0]] * 2)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    return corners * limits


def make_batch(objects=(2, 3), proposals: int = 40, seed: int = 0):
    """Proposals and ground truth of two images; the images of ``objects`` 0 have none."""
    generator = torch.Generator().manual_seed(seed)
    truths, proposed = [], []
    for size, count in zip(SIZES, objects):
        classes = torch.randint(3, (count,), generator=generator)
        truths.append(Instances(size, gt_boxes=Boxes(random_boxes(count, size, generator)), gt_classes=classes))
        proposed.append(Instances(
            size, proposal_boxes=Boxes(random_boxes(proposals, size, generator)),
            objectness_logits=torch.randn(proposals, generator=generator),
        ))
    return proposed, truths


def in_stages(heads, features, proposals, truths, **kwargs):
    """Sampled proposals, stages, losses, and the scalars that they recorded."""
    torch.manual_seed(5)
    staged = StagedRoIHeads(heads)
    with EventStorage() as storage:
        sampled = heads.label_and_sample_proposals(proposals, truths)
        stages = staged.run(features, sampled, truths)
        losses = staged.losses(stages, **kwargs)
    return sampled, stages, losses, storage.latest()


def as_a_whole(heads, features, proposals, truths):
    torch.manual_seed(5)
    images = ImageList(torch.zeros(2, 3, 128, 128), SIZES)
    with EventStorage() as storage:
        _, losses = heads(images, features, proposals, truths)
    return losses, storage.latest()


@pytest.mark.parametrize("objects", [(2, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("case", [STANDARD, CASCADE])
def test_losses_are_the_heads_own(case, objects):
    heads = make_heads(case)
    ours, theirs = make_features(), make_features()
    expected, expected_scalars = as_a_whole(heads, theirs, *make_batch(objects))
    sum(expected.values()).backward()
    gradients = {name: p.grad.clone() for name, p in heads.named_parameters()}
    heads.zero_grad()
    _, stages, losses, scalars = in_stages(heads, ours, *make_batch(objects))
    assert list(losses) == list(expected) and len(stages) == (1 if case == STANDARD else 3)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    # Detectron2's cascade divides what its stages send to the features.
    for name, feature in ours.items():
        torch.testing.assert_close(feature.grad, len(stages) * theirs[name].grad, rtol=1e-4, atol=1e-6)
    assert scalars == {
        name: value for name, value in expected_scalars.items()
        if not (name.startswith("stage") and "roi_head/" in name)
    }


def test_stage_weights():
    heads = make_heads(CASCADE)
    _, _, plain, _ = in_stages(heads, make_features(), *make_batch())
    _, _, weighted, _ = in_stages(heads, make_features(), *make_batch(), stage_weights=[1.0, 0.5, 0.25])
    assert len(weighted) == 6
    for name, loss in weighted.items():
        assert torch.equal(loss, plain[name] * 0.5 ** int(name[-1])) and loss > 0


def slow_outputs(heads, index: int, features, image: int, box: torch.Tensor):
    """The two vectors, logits and deltas of a box of an image, in float64."""
    x1, y1, x2, y2 = box.double().tolist()
    level = math.floor(4 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 224 + 1e-8))
    level = min(max(level, 2), 5)
    feature = features[f"p{level}"][image : image + 1].double()
    pooled = roi_align(feature, [box[None].double()], 3, 1 / 2**level, sampling_ratio=0, aligned=True)
    head, predictor = heads.box_head, heads.box_predictor
    if isinstance(head, nn.ModuleList):
        head, predictor = head[index], predictor[index]
    first = head.fc1(pooled.flatten(1)).relu()
    second = head.fc2(first).relu()
    return first[0], second[0], predictor.cls_score(second)[0], predictor.bbox_pred(second)[0]


@pytest.mark.parametrize("case", [STANDARD, CASCADE])
def test_outputs_against_a_slow_form(case):
    heads, features = make_heads(case), make_features()
    staged, generator = StagedRoIHeads(heads), torch.Generator().manual_seed(1)
    boxes = [Boxes(random_boxes(count, size, generator)) for count, size in zip((5, 3), SIZES)]
    assert staged.fc_dims == [32, 32]
    slow = copy.deepcopy(heads).double()
    with torch.no_grad():
        for index in range(staged.num_stages):
            outputs = staged.stage(index, features, boxes)
            rows = [
                slow_outputs(slow, index, features, image, box)
                for image in (0, 1) for box in boxes[image].tensor
            ]
            fast = (*outputs.vectors, outputs.logits, outputs.deltas)
            assert [x.shape for x in fast] == [(8, 32), (8, 32), (8, 4), (8, 12 if case == STANDARD else 4)]
            for ours, theirs in zip(fast, zip(*rows)):
                torch.testing.assert_close(ours.double(), torch.stack(theirs), rtol=1e-4, atol=1e-4)


def slow_refine(stage: RoIStage, weights, truths, threshold: float):
    """Per image the labelled boxes that a stage's deltas lead to, box by box in float64."""
    deltas, results, row = stage.outputs.deltas.double(), [], 0
    for proposals, truth in zip(stage.proposals, truths):
        rows = []
        for x1, y1, x2, y2 in proposals.proposal_boxes.tensor.double().tolist():
            dx, dy, dw, dh = (value / weight for value, weight in zip(deltas[row].tolist(), weights))
            row += 1
            dw, dh = (min(value, math.log(1000 / 16)) for value in (dw, dh))
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            height, width = truth.image_size
            box = [
                min(max(value, 0), limit)
                for value, limit in zip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), (width, height) * 2)
            ]
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            overlaps = [
                box_iou(torch.tensor([box]).double(), gt[None].double()).item() for gt in truth.gt_boxes.tensor
            ]
            best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
            positive = best is not None and overlaps[best] >= threshold
            rows.append((box, truth.gt_classes[best].item() if positive else 3, best))
        results.append(rows)
    return results


@pytest.mark.parametrize("objects", [(2, 3), (3, 0)])
def test_steps_of_a_cascade_against_a_slow_form(objects):
    heads, (proposals, truths) = make_heads(CASCADE), make_batch(objects)
    sampled, stages, _, _ = in_stages(heads, make_features(), proposals, truths)
    assert stages[0].proposals is sampled
    weights, thresholds = [(10, 10, 5, 5), (20, 20, 10, 10)], (0.2, 0.1)
    for last, stage, *settings in zip(stages, stages[1:], weights, thresholds):
        expected = slow_refine(last, settings[0], truths, settings[1])
        for ours, rows, truth in zip(stage.proposals, expected, truths):
            assert ours.image_size == truth.image_size and len(ours) == len(rows) > 10
            corners = torch.tensor([box for box, _, _ in rows])
            torch.testing.assert_close(ours.proposal_boxes.tensor, corners, rtol=1e-4, atol=1e-3)
            assert ours.gt_classes.tolist() == [label for _, label, _ in rows]
            assert ours.has("gt_boxes") == (len(truth) > 0)
            if len(truth) > 0:
                matches = torch.tensor([match for _, _, match in rows])
                assert torch.equal(ours.gt_boxes.tensor, truth.gt_boxes.tensor[matches])
                assert (ours.gt_classes < 3).any()
            assert not ours.proposal_boxes.tensor.requires_grad


def test_empty_boxes_leave_a_cascade():
    """Boxes that are moved out of the image are not handed on."""
    heads, features = make_heads(CASCADE), make_features()
    with torch.no_grad():
        heads.box_predictor[0].bbox_pred.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    _, stages, losses, _ = in_stages(heads, features, *make_batch())
    assert sum(map(len, stages[0].proposals)) > 0
    assert [len(image) for stage in stages[1:] for image in stage.proposals] == [0] * 4
    assert all(losses[f"{name}_stage{k}"] == 0 for name in ("loss_cls", "loss_box_reg") for k in (1, 2))
    assert stages[2].outputs.vectors[1].shape == (0, 32)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize("objects", [(1, 0), (0, 0)])
@pytest.mark.parametrize("case", [STANDARD, CASCADE])
def test_without_proposals(case, objects):
    """Only the ground truth, or nothing at all, is left: finite losses that reach every parameter."""
    heads, features = make_heads(case), make_features()
    _, stages, losses, _ = in_stages(heads, features, *make_batch(objects, proposals=0))
    assert sum(map(len, stages[0].proposals)) == sum(objects) == len(stages[0].outputs.logits)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    if not any(objects):
        assert all(loss == 0 for loss in losses.values())
        assert not any(p.grad.any() for p in heads.parameters())


def test_single_pixel_objects():
    heads, (proposals, truths) = make_heads(CASCADE), make_batch()
    for truth in truths:
        truth.gt_boxes.tensor[:, 2:] = truth.gt_boxes.tensor[:, :2] + 1
    _, stages, losses, _ = in_stages(heads, make_features(), proposals, truths)
    assert (stages[0].proposals[0].gt_classes < 3).any() and all(x.isfinite() for x in losses.values())


def test_convolutions_in_front_of_the_layers():
    overrides = {"ROI_BOX_HEAD__NUM_CONV": 2, "ROI_BOX_HEAD__CONV_DIM": 8, "ROI_BOX_HEAD__NUM_FC": 1}
    heads, features = make_heads(STANDARD, **overrides), make_features()
    staged, boxes = StagedRoIHeads(heads), [image.proposal_boxes for image in make_batch()[0]]
    outputs = staged.stage(0, features, boxes)
    vectors = heads.box_head(heads.box_pooler(list(features.values()), boxes))
    assert staged.fc_dims == [32]
    assert len(outputs.vectors) == 1 and torch.equal(outputs.vectors[0], vectors) and vectors.min() == 0


class OtherHead(nn.Sequential):
    pass


@pytest.mark.parametrize("kind", ["convolutions only", "another class"])
def test_heads_without_layers_to_compare(kind):
    """They run, but have no vectors, which whoever asks for their widths is told."""
    overrides = {"ROI_BOX_HEAD__NUM_CONV": 1, "ROI_BOX_HEAD__NUM_FC": 0}
    heads = make_heads(STANDARD, **(overrides if kind == "convolutions only" else {}))
    if kind == "another class":
        heads.box_head = OtherHead(*heads.box_head)
    _, stages, losses, _ = in_stages(heads, make_features(), *make_batch())
    assert stages[0].outputs.vectors == [] and all(loss > 0 for loss in losses.values())
    with pytest.raises(UserError, match="no fully connected layers.*MODEL.ROI_BOX_HEAD.NAME 'FastRCNNConvFCHead'"):
        StagedRoIHeads(heads).fc_dims


def test_a_run_offers_the_students_own_vectors():
    model = build(detector_cfg(STANDARD), salt=2).train()
    staged, inputs = stage_detector(model), batch()
    torch.manual_seed(3)
    with EventStorage():
        run = staged.run(staged.preprocess(inputs), [x["instances"] for x in inputs])
        (roi,) = run.rois
        assert isinstance(roi.outputs, RoIOutputs) and roi.proposals is run.sampled_proposals
        vectors = roi.outputs.vectors
        assert [x.shape for x in vectors] == [(len(roi.outputs.logits), 32)] * 2
        (gradient,) = torch.autograd.grad(run.losses["loss_cls"], vectors[1])
    scores = model.roi_heads.box_predictor.cls_score(vectors[1])
    assert torch.equal(scores, roi.outputs.logits) and gradient.any()


@pytest.mark.parametrize(
    "case, overrides",
    [
        (CASCADE, {}),
        pytest.param(
            STANDARD, {"MASK_ON": True, "ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"},
            marks=pytest.mark.skipif(provider.name() == "embedded", reason="the embedded Detectron2 has no masks"),
        ),
    ],
)
def test_other_heads_run_as_a_whole(case, overrides):
    staged, inputs = stage_detector(build(detector_cfg(case, **overrides)).train()), batch()
    assert staged.roi_heads.num_stages == (3 if case == CASCADE else 1) and not staged.has_roi_stages
    run = staged.run(staged.preprocess(inputs), [x["instances"] for x in inputs])
    assert run.rois == []
