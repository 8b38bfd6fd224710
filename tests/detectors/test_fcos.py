"""The options of OpenMMLabFCOS: what each changes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes

from d2_distill.errors import UserError

from ..small_detectors import batch, build, detector_cfg


def _build(**options):
    return build(detector_cfg("OpenMMLabFCOS", **{f"FCOS__{key}": value for key, value in options.items()}))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("DISTANCES", "linear", "MODEL.FCOS.DISTANCES is 'linear'; choose from exp, relu"),
        ("CENTERNESS_ON", "", "MODEL.FCOS.CENTERNESS_ON is ''; choose from box, cls"),
        ("SIZES_OF_INTEREST", [64, 128, 256, 512], "_INTEREST has 4 bounds, but the 3 levels .* need 2"),
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
    assert _build(CENTERNESS_ON="cls").head.predictors["centerness"][0] == "cls"
    assert _build(CENTERNESS_ON="box").head.predictors["centerness"][0] == "box"
    # Convolutions in front of a norm have a bias in AdelaiDet's form only; those without a norm always.
    for options, bias in (({}, False), ({"TOWER_BIAS": True}, True), ({"NORM": ""}, True)):
        assert (_build(**options).head.cls_subnet[0].bias is not None) == bias


def test_scores_are_square_roots_on_request():
    plain, rooted = (_build(SQRT_SCORES=value) for value in (False, True))
    outputs = {"centerness": torch.tensor([[0.5], [-1.0]])}
    scores = torch.tensor([[0.2, 0.9], [0.4, 0.1]])
    product = scores * outputs["centerness"].sigmoid()
    assert torch.equal(plain.final_scores(scores, outputs), product)
    assert torch.equal(rooted.final_scores(scores, outputs), product.sqrt())


@pytest.mark.parametrize("radius, fewer", [(0.0, False), (1.0, True)])
def test_center_sampling(radius, fewer):
    """Without it all locations in a box of the right size are positive, with it those near its centre."""
    model, inputs = _build(CENTER_SAMPLING_RADIUS=radius), batch()
    features = model.backbone(model.preprocess_image(inputs).tensor)
    anchors = model.anchor_generator([features[name] for name in model.head_in_features])
    assignment = model.assign(anchors, [x["instances"] for x in inputs])
    points = Boxes.cat(anchors).get_centers()
    strides = model.strides_of(anchors)
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
