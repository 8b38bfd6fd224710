"""The options of OpenMMLabFCOS: what each changes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances

from d2_distill.errors import UserError
from d2_distill.layers.tower import Tap
from d2_distill.staged import stage_detector

from ..same_detections import assert_same_detections
from ..small_detectors import batch, build, detector_cfg


def _build(**options):
    return build(detector_cfg("OpenMMLabFCOS", **{f"FCOS__{key}": value for key, value in options.items()}))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("DISTANCES", "linear", "MODEL.FCOS.DISTANCES is 'linear'; choose from exp, relu"),
        ("CENTERNESS_ON", "", "MODEL.FCOS.CENTERNESS_ON is ''; choose from box, cls"),
        ("SIZES_OF_INTEREST", [64, 128, 256, 512], "_INTEREST has 4 bounds, but the 3 levels .* need 2"),
        ("INFERENCE", "fcos", "MODEL.FCOS.INFERENCE is 'fcos'; choose from openmmlab, adelaidet"),
        ("THRESH_WITH_CTR", True, "THRESH_WITH_CTR is True, which .*INFERENCE 'openmmlab' does not have"),
        ("BOX_LOSS", "l1", "MODEL.FCOS.BOX_LOSS is 'l1'; choose from giou, iou, linear_iou, diou, ciou"),
    ],
)
def test_wrong_values(option, value, message):
    with pytest.raises(UserError, match=message):
        _build(**{option: value})


@pytest.mark.parametrize("loss", ["diou", "ciou"])
def test_an_offset_that_the_box_loss_does_not_have(loss):
    with pytest.raises(UserError, match=f"MODEL.FCOS.IOU_OFFSET is 1.0, .* box loss '{loss}' does not have"):
        _build(BOX_LOSS=loss, IOU_OFFSET=1.0)
    _build(BOX_LOSS=loss)
    _build(BOX_LOSS="linear_iou", IOU_OFFSET=1.0)


def test_forms_of_the_head():
    assert _build(CENTERNESS_ON="cls").head.predictors["centerness"].reads == (("cls", Tap(2)),)
    assert _build(CENTERNESS_ON="box").head.predictors["centerness"].reads == (("box", Tap(2)),)
    # Convolutions in front of a norm have a bias in AdelaiDet's form only; those without a norm always.
    for options, bias in (({}, False), ({"TOWER_BIAS": True}, True), ({"NORM": ""}, True)):
        assert (_build(**options).head.cls_subnet[0].bias is not None) == bias
    head = _build(PREDICTOR_BIAS=False).head
    assert head.bbox_pred.bias is head.ctrness.bias is None and head.cls_score.bias is not None


def slow_adelaidet(model, outputs, anchors) -> list:
    """Rows (score, class, box) of one image by loops; ``outputs`` are (R_l, K), one a level."""
    candidates = []
    for level, boxes in enumerate(anchors):
        pairs = []
        for row, (x0, y0, x1, y1) in enumerate(boxes.tensor.tolist()):
            quality = outputs["centerness"][level][row].sigmoid().item()
            sides = [8 * 2**level * max(side, 0) for side in outputs["deltas"][level][row].tolist()]
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            box = [x - sides[0], y - sides[1], x + sides[2], y + sides[3]]
            for label, score in enumerate(outputs["logits"][level][row].sigmoid().tolist()):
                if (score * quality if model.thresh_with_ctr else score) > model.test_score_thresh:
                    pairs.append(((score * quality) ** 0.5, label, *box))
        candidates += sorted(pairs, reverse=True)[: model.test_topk_candidates]
    candidates.sort(reverse=True)
    found = []
    for candidate in candidates:
        if not any(
            other[1] == candidate[1] and iou(other[2:], candidate[2:]) > model.test_nms_thresh > 0
            for other in found
        ):
            found.append(candidate)
    last = model.max_detections_per_image - 1
    return [x for x in found if last >= len(found) or x[0] >= found[last][0]]


def iou(box1, box2) -> float:
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box1, box2)]
    width, height = (max(min(box1[k + 2], box2[k + 2]) - max(box1[k], box2[k]), 0) for k in (0, 1))
    return width * height / (sum(areas) - width * height) if width * height else 0.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"THRESH_WITH_CTR": True},
        {"TOPK_CANDIDATES_TEST": 7},
        {"NMS_THRESH_TEST": 0.0, "TOPK_CANDIDATES_TEST": 12},
        {"SCORE_THRESH_TEST": 1.0},
    ],
)
@pytest.mark.parametrize("most", [1000, 9])
def test_adelaidet_inference_against_a_loop(options, most):
    model = _build(INFERENCE="adelaidet", DISTANCES="relu", **options).eval()
    model.max_detections_per_image = most
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 12), (4, 6), (2, 3)]
    features = [torch.zeros(2, 1, *size) for size in sizes]
    outputs = [
        [scale * torch.randn(2, channels, *size, generator=generator) for size in sizes]
        for channels, scale in ((3, 2.0), (4, 1.5), (1, 1.0))
    ]
    anchors = model.anchor_generator(features)
    images = ImageList.from_tensors([torch.zeros(3, 64, 96), torch.zeros(3, 50, 80)])
    for index, detections in enumerate(model.forward_inference(images, features, outputs)):
        of_image = {
            name: [x[index].flatten(1).T for x in levels]
            for name, levels in zip(("logits", "deltas", "centerness"), outputs)
        }
        expected = torch.tensor(slow_adelaidet(model, of_image, anchors)).reshape(-1, 6)
        assert (len(expected) == 0) == (options == {"SCORE_THRESH_TEST": 1.0})
        if len(expected) == 0:
            assert len(detections) == 0
            continue
        scores, classes, boxes = expected.split((1, 1, 4), dim=1)
        expected = Instances((1, 1), scores=scores[:, 0], pred_classes=classes[:, 0], pred_boxes=Boxes(boxes))
        assert_same_detections(detections, expected)


def test_adelaidet_keeps_equals_of_the_last_detection():
    """And the suppression sees boxes that reach out of the image."""
    model = _build(INFERENCE="adelaidet", DISTANCES="relu").eval()
    model.max_detections_per_image = 2
    sizes = [(4, 4), (2, 2), (1, 1)]
    logits = [torch.full((1, 3, *size), -9.0) for size in sizes]
    for x in range(4):
        logits[0][0, 1, 0, x] = 1.0
    deltas, centerness = ([torch.ones(1, channels, *size) for size in sizes] for channels in (4, 1))
    deltas[0][0, 1] = 100.0
    images = ImageList.from_tensors([torch.zeros(3, 32, 32)])
    (found,) = model.forward_inference(images, logits, [logits, deltas, centerness])
    assert len(found) == 4 and (found.scores == found.scores[0]).all()
    assert (found.pred_boxes.tensor[:, 1] < -700).all()


@pytest.mark.parametrize("radius, fewer", [(0.0, False), (1.0, True)])
def test_center_sampling(radius, fewer):
    """Without it all locations in a box of the right size are positive, with it those near its centre."""
    model, inputs = _build(CENTER_SAMPLING_RADIUS=radius), batch()
    run = stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])
    assignment, points, strides = run.assignment, run.grid.centers, run.grid.stride
    inside, near = 0, 0
    for index, x in enumerate(inputs):
        for box, label in zip(x["instances"].gt_boxes.tensor, x["instances"].gt_classes):
            distances = torch.cat([points - box[:2], box[2:] - points], dim=1)
            level = torch.log2(strides / 8).long()
            ends = torch.tensor([[-1.0, 32], [32, 64], [64, float("inf")]])[level]
            farthest = distances.amax(dim=1)
            fits = (distances.amin(dim=1) > 0) & (farthest >= ends[:, 0]) & (farthest <= ends[:, 1])
            center = (box[:2] + box[2:]) / 2
            close = fits & ((points - center).abs() < radius * strides[:, None]).all(dim=1)
            wanted = close if fewer else fits
            assert (assignment.labels[index][wanted] == label).all()
            inside, near = inside + int(fits.sum()), near + int(close.sum())
    assert assignment.foreground.sum() == (near if fewer else inside) > 0
    assert not fewer or near < inside
