"""Faster R-CNN at its edges: nothing proposed, no ground truth, class-agnostic boxes, bad numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from d2_distill import provider

NUM_CLASSES = 3
SIZE = (64, 96)


def make_config(*opts):
    """A ResNet-18 FPN Faster R-CNN with narrow heads; every labelled anchor and proposal is used."""
    cfg = get_cfg()
    levels = ["p2", "p3", "p4", "p5", "p6"]
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
        "MODEL.RPN.IN_FEATURES", levels,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8192, "MODEL.RPN.POSITIVE_FRACTION", 1.0,
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1],
        "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3, *opts,
    ])
    return cfg


def make_model(*opts):
    torch.manual_seed(0)
    return build_model(make_config(*opts))


def make_gt(boxes, classes, **fields):
    boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    return Instances(SIZE, gt_boxes=boxes, gt_classes=torch.tensor(classes).long(), **fields)


def make_proposals(boxes, logits=None, **fields):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    logits = torch.zeros(len(boxes)) if logits is None else torch.tensor(logits)
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=logits, **fields)


GT = ([[8.0, 8.0, 40.0, 40.0], [50.0, 4.0, 90.0, 60.0]], [0, 2])
NO_GT = ([], [])


def make_batch(*ground_truths):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *SIZE), generator=generator).float() for _ in ground_truths]
    return [{"image": image, "instances": make_gt(*gt)} for image, gt in zip(images, ground_truths)]


class TestProposalSelection:
    BOX, SHIFTED = [10.0, 10.0, 30.0, 30.0], [11.0, 11.0, 31.0, 31.0]

    def select(self, levels, training=False, pre=10, post=10, min_size=0.0, nms=0.7):
        boxes = [torch.tensor([[box for box, _ in level]]) for level in levels]
        logits = [torch.tensor([[logit for _, logit in level]]) for level in levels]
        (result,) = find_top_rpn_proposals(boxes, logits, [SIZE], nms, pre, post, min_size, training)
        assert result.image_size == SIZE
        return result.proposal_boxes.tensor.tolist(), result.objectness_logits.tolist()

    def test_boxes_of_other_levels_do_not_suppress(self):
        boxes, logits = self.select([[(self.BOX, 1.0), (self.SHIFTED, 2.0)], [(self.BOX, 3.0)]])
        assert (boxes, logits) == ([self.BOX, self.SHIFTED], [3.0, 2.0])

    def test_limits_per_level_and_per_image(self):
        far = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(4)]
        levels = [[(box, float(i)) for i, box in enumerate(far)], [(self.BOX, 1.5)]]
        assert self.select(levels, pre=2)[1] == [3.0, 2.0, 1.5]
        assert self.select(levels, pre=2, post=1)[1] == [3.0]

    def test_boxes_are_clipped_and_small_ones_dropped(self):
        across, outside, thin = [-5.0, 60.0, 20.0, 80.0], [100.0, 0.0, 110.0, 9.0], [0.0, 0.0, 4.0, 50.0]
        levels = [[(across, 0.0), (outside, 2.0), (thin, 1.0)]]
        assert self.select(levels)[0] == [thin, [0.0, 60.0, 20.0, 64.0]]
        assert self.select(levels, min_size=4.0) == ([], [])

    @pytest.mark.parametrize("bad", [([math.inf, 0.0, 1.0, 1.0], 5.0), (BOX, math.nan)])
    def test_bad_numbers_stop_training_but_not_inference(self, bad):
        levels = [[bad, (self.SHIFTED, 1.0)]]
        assert self.select(levels) == ([self.SHIFTED], [1.0])
        with pytest.raises(FloatingPointError):
            self.select(levels, training=True)

    def test_ground_truth_is_appended_as_almost_certain(self):
        proposals = [make_proposals([self.BOX], [0.5]), make_proposals([self.BOX], [0.5])]
        with_gt, without = add_ground_truth_to_proposals([make_gt(*GT), make_gt(*NO_GT)], proposals)
        assert with_gt.proposal_boxes.tensor.tolist() == [self.BOX, *GT[0]]
        assert with_gt.objectness_logits.tolist() == pytest.approx([0.5, 23.02585, 23.02585], rel=1e-5)
        assert without.proposal_boxes.tensor.tolist() == [self.BOX]


class TestRPN:
    SHAPES = {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)}

    def make_rpn(self, *opts):
        torch.manual_seed(0)
        cfg = make_config(
            "MODEL.RPN.IN_FEATURES", ["p3", "p4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]], *opts)
        return RPN(cfg, self.SHAPES)

    def run(self, rpn, *targets):
        generator = torch.Generator().manual_seed(2)
        n = len(targets)
        features = {
            name: torch.randn(n, 4, SIZE[0] // shape.stride, SIZE[1] // shape.stride, generator=generator)
            for name, shape in self.SHAPES.items()
        }
        images = ImageList(torch.zeros(n, 3, *SIZE), [SIZE] * n)
        with EventStorage() as storage:
            proposals, losses = rpn(images, features, [make_gt(*target) for target in targets])
        return proposals, losses, {name: value for name, (value, _) in storage.latest().items()}

    def labels(self, rpn, target):
        features = [torch.zeros(1, 4, SIZE[0] // s.stride, SIZE[1] // s.stride) for s in self.SHAPES.values()]
        labels, boxes = rpn.label_and_sample_anchors(rpn.anchor_generator(features), [make_gt(*target)])
        return labels[0], boxes[0]

    def test_several_convolutions_get_numbered_names(self):
        head = StandardRPNHead(in_channels=4, num_anchors=3, conv_dims=[-1, 6])
        shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")}
        assert shapes == {
            "conv.conv0.weight": (4, 4, 3, 3), "conv.conv1.weight": (6, 4, 3, 3),
            "objectness_logits.weight": (3, 6, 1, 1), "anchor_deltas.weight": (12, 6, 1, 1),
        }
        (logits,), (deltas,) = head([torch.randn(2, 4, 5, 7)])
        assert logits.shape == (2, 3, 5, 7) and deltas.shape == (2, 12, 5, 7)

    def test_predictions_stay_with_their_anchor(self):
        rpn = self.make_rpn("MODEL.RPN.NMS_THRESH", 1.0)
        rpn.eval()
        for layer in (rpn.rpn_head.objectness_logits, rpn.rpn_head.anchor_deltas):
            torch.nn.init.zeros_(layer.weight)
        rpn.rpn_head.objectness_logits.bias.data = torch.tensor([0.0, 1.0, 0.0])
        shift = torch.zeros(3, 4)
        shift[1, 0] = 0.5  # the second anchor (ratio 1) moves right by half its width
        rpn.rpn_head.anchor_deltas.bias.data = shift.flatten()
        boxes = self.run(rpn, GT)[0][0]
        best = boxes.proposal_boxes.tensor[boxes.objectness_logits == 1.0]
        assert len(best) == 20
        inside = best[(best[:, 0] > 0) & (best[:, 1] > 0) & (best[:, 2] < SIZE[1]) & (best[:, 3] < SIZE[0])]
        on_grid = inside[(inside[:, 2] - inside[:, 0]) == 16]
        assert len(on_grid) and torch.equal(on_grid[:, 0] % 8, torch.zeros(len(on_grid)))

    def test_losses_equal_a_slow_form(self):
        rpn = self.make_rpn(
            "MODEL.RPN.LOSS_WEIGHT", 2.0, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 3.0,
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1000)
        anchors = Boxes.cat(rpn.anchor_generator([torch.zeros(1, 4, 8, 12), torch.zeros(1, 4, 4, 6)])).tensor
        logits, deltas = torch.randn(1, len(anchors)), torch.randn(1, len(anchors), 4)
        labels, gt_boxes = self.labels(rpn, GT)
        split = [288, len(anchors) - 288]
        with EventStorage():
            losses = rpn.losses(
                [Boxes(a) for a in anchors.split(split)], list(logits.split(split, 1)), [labels],
                list(deltas.split(split, 1)), [gt_boxes])
        cls = loc = 0.0
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                cls += F.softplus(logits[0, i] if label == 0 else -logits[0, i])
            if label == 1:
                (x0, y0, x1, y1), (u0, v0, u1, v1) = anchors[i], gt_boxes[i]
                w, h = x1 - x0, y1 - y0
                target = torch.stack([
                    (u0 + u1 - x0 - x1) / 2 / w, (v0 + v1 - y0 - y1) / 2 / h,
                    torch.log((u1 - u0) / w), torch.log((v1 - v0) / h)])
                loc += (deltas[0, i] - target).abs().sum()
        torch.testing.assert_close(losses["loss_rpn_cls"], 2 * cls / 1000)
        torch.testing.assert_close(losses["loss_rpn_loc"], 6 * loc / 1000)

    def test_image_without_ground_truth_is_all_background(self):
        labels, boxes = self.labels(self.make_rpn(), NO_GT)
        assert not labels.any() and boxes.shape == (len(labels), 4)

    def test_losses_without_ground_truth_reach_every_parameter(self):
        rpn = self.make_rpn()
        proposals, losses, scalars = self.run(rpn, NO_GT, NO_GT)
        assert losses["loss_rpn_loc"].item() == 0 and losses["loss_rpn_cls"].item() > 0
        assert scalars["rpn/num_pos_anchors"] == 0 and scalars["rpn/num_neg_anchors"] == 3 * (8 * 12 + 4 * 6)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in rpn.parameters())
        assert all(len(p) and not p.proposal_boxes.tensor.requires_grad for p in proposals)

    def test_sampling_is_capped(self):
        rpn = self.make_rpn("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10, "MODEL.RPN.POSITIVE_FRACTION", 0.2)
        labels, _ = self.labels(rpn, GT)
        assert (labels == 1).sum() == 2 and (labels == 0).sum() == 8

    def test_anchors_across_the_border_are_ignored_on_demand(self):
        everywhere, _ = self.labels(self.make_rpn(), NO_GT)
        rpn = self.make_rpn("MODEL.RPN.BOUNDARY_THRESH", 0)
        inside, _ = self.labels(rpn, NO_GT)
        anchors = rpn.anchor_generator([torch.zeros(1, 4, 8, 12), torch.zeros(1, 4, 4, 6)])
        x0, y0, x1, y1 = Boxes.cat(anchors).tensor.unbind(1)
        expected = (x0 >= 0) & (y0 >= 0) & (x1 < SIZE[1]) & (y1 < SIZE[0])
        assert (everywhere == 0).all() and torch.equal(inside == 0, expected)
        assert 0 < expected.sum() < len(expected)


class TestProposalSampling:
    def make_heads(self, *opts):
        shapes = {f"p{k}": ShapeSpec(channels=4, stride=2**k) for k in range(2, 6)}
        return StandardROIHeads(make_config(*opts), shapes)

    def sample(self, heads, proposals, targets):
        with EventStorage() as storage:
            result = heads.label_and_sample_proposals(proposals, targets)
        return result, {name: value for name, (value, _) in storage.latest().items()}

    def test_foreground_comes_first_with_every_field_of_its_object(self):
        heads = self.make_heads(
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5)
        target = make_gt(*GT, gt_ids=torch.tensor([70, 80]))
        proposals = make_proposals([[0.0, 0.0, 5.0, 5.0]] * 6 + GT[0])
        (result,), scalars = self.sample(heads, [proposals], [target])
        classes = result.gt_classes.tolist()
        assert all(c < NUM_CLASSES for c in classes[:2]) and classes[2:] == [NUM_CLASSES] * 2
        assert [{0: 70, 2: 80}[c] for c in classes[:2]] == result.gt_ids[:2].tolist()
        assert torch.equal(result.gt_boxes.tensor[:2], result.proposal_boxes.tensor[:2])
        assert (scalars["roi_head/num_fg_samples"], scalars["roi_head/num_bg_samples"]) == (2, 2)

    def test_ground_truth_is_a_proposal_unless_switched_off(self):
        proposals = make_proposals([[0.0, 0.0, 5.0, 5.0]])
        (result,), _ = self.sample(self.make_heads(), [proposals], [make_gt(*GT)])
        assert sorted(result.gt_classes.tolist()) == [0, 2, NUM_CLASSES]
        heads = self.make_heads("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False)
        (result,), _ = self.sample(heads, [proposals], [make_gt(*GT)])
        assert result.gt_classes.tolist() == [NUM_CLASSES]

    def test_image_without_ground_truth_gives_background(self):
        (result,), _ = self.sample(self.make_heads(), [make_proposals(GT[0])], [make_gt(*NO_GT)])
        assert result.gt_classes.tolist() == [NUM_CLASSES] * 2

    def test_no_proposal_and_no_ground_truth(self):
        (result,), scalars = self.sample(self.make_heads(), [make_proposals([])], [make_gt(*NO_GT)])
        assert len(result) == 0
        assert scalars == {"roi_head/num_fg_samples": 0, "roi_head/num_bg_samples": 0}


class TestBoxHead:
    def test_convolutions_before_layers(self):
        head = FastRCNNConvFCHead(
            ShapeSpec(channels=4, height=3, width=3), conv_dims=[8, 6], fc_dims=[5, 7], conv_norm="BN")
        assert [name for name, _ in head.named_children()] == [
            "conv1", "conv2", "flatten", "fc1", "fc_relu1", "fc2", "fc_relu2"]
        assert head.conv1.bias is None and not head.fc1.bias.any()
        assert head.output_shape.channels == 7
        assert head(torch.randn(2, 4, 3, 3)).shape == (2, 7) and head(torch.randn(0, 4, 3, 3)).shape == (0, 7)

    def test_convolutions_only_keep_the_map(self):
        head = FastRCNNConvFCHead(ShapeSpec(channels=4, height=3, width=2), conv_dims=[8], fc_dims=[])
        shape = head.output_shape
        assert (shape.channels, shape.height, shape.width) == (8, 3, 2)
        assert head(torch.randn(5, 4, 3, 2)).shape == (5, 8, 3, 2)

    def test_a_head_without_layers_is_refused(self):
        with pytest.raises(AssertionError):
            FastRCNNConvFCHead(ShapeSpec(channels=4, height=3, width=3), conv_dims=[], fc_dims=[])


class TestOutputLayers:
    def make_layers(self, *opts):
        torch.manual_seed(0)
        return FastRCNNOutputLayers(make_config(*opts), ShapeSpec(channels=6))

    def make_sampled(self):
        boxes = [[8.0, 6.0, 38.0, 40.0], [1.0, 1.0, 9.0, 5.0], [48.0, 4.0, 92.0, 62.0]]
        gt_boxes = Boxes(torch.tensor([GT[0][0], GT[0][0], GT[0][1]]))
        first = make_proposals(boxes, gt_classes=torch.tensor([0, NUM_CLASSES, 2]), gt_boxes=gt_boxes)
        without_gt = make_proposals(boxes[:1], gt_classes=torch.tensor([NUM_CLASSES]))
        return [first, without_gt]

    def losses(self, layers, predictions, proposals):
        with EventStorage():
            return layers.losses(predictions, proposals)

    @pytest.mark.parametrize("agnostic", [False, True])
    def test_box_loss_equals_a_slow_form(self, agnostic):
        layers = self.make_layers("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic,
                                  "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.0)
        scores, deltas = layers(torch.randn(4, 6, 1, 1))
        assert deltas.shape == (4, 4 if agnostic else 4 * NUM_CLASSES)
        deltas = deltas + torch.randn_like(deltas)
        losses = self.losses(layers, (scores, deltas), self.make_sampled())
        expected = 0.0
        for row, label, box, gt in ((0, 0, (8, 6, 38, 40), GT[0][0]), (2, 2, (48, 4, 92, 62), GT[0][1])):
            w, h = box[2] - box[0], box[3] - box[1]
            target = (
                5 * (gt[0] + gt[2] - box[0] - box[2]) / w, 5 * (gt[1] + gt[3] - box[1] - box[3]) / h,
                5 * math.log((gt[2] - gt[0]) / w), 5 * math.log((gt[3] - gt[1]) / h))
            column = 0 if agnostic else 4 * label
            expected += sum(abs(deltas[row, column + k].item() - target[k]) for k in range(4))
        assert losses["loss_box_reg"].item() == pytest.approx(2 * expected / 4, rel=1e-5)
        log_probs = scores.log_softmax(1)
        expected = -sum(log_probs[row, label] for row, label in ((0, 0), (1, 3), (2, 2), (3, 3))) / 4
        torch.testing.assert_close(losses["loss_cls"], expected)

    def test_losses_of_nothing_are_zero_and_reach_the_boxes(self):
        layers = self.make_layers()
        nothing = make_proposals([], gt_classes=torch.zeros(0, dtype=torch.long))
        losses = self.losses(layers, layers(torch.randn(0, 6)), [nothing])
        assert {name: loss.item() for name, loss in losses.items()} == {"loss_cls": 0.0, "loss_box_reg": 0.0}
        sum(losses.values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in layers.parameters())

    @pytest.mark.parametrize("agnostic", [False, True])
    def test_inference_without_proposals(self, agnostic):
        layers = self.make_layers("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic).eval()
        (result,), (rows,) = layers.inference(layers(torch.randn(0, 6)), [make_proposals([])])
        assert len(result) == len(rows) == 0 and result.pred_boxes.tensor.shape == (0, 4)


class TestDetections:
    BOXES = [[10.0, 10.0, 30.0, 30.0], [11.0, 11.0, 31.0, 31.0], [50.0, 20.0, 120.0, 40.0]]

    def detect(self, scores, boxes=None, score_thresh=0.25, topk=10):
        boxes = torch.tensor(boxes or self.BOXES)
        (result,), (rows,) = fast_rcnn_inference(
            [boxes], [torch.tensor(scores)], [SIZE], score_thresh, nms_thresh=0.5, topk_per_image=topk)
        return result, rows.tolist()

    def test_suppression_is_class_wise_and_the_threshold_strict(self):
        # columns: two classes and the background
        result, rows = self.detect([[0.5, 0.0, 0.9], [0.75, 0.375, 0.9], [0.25, 0.3125, 0.9]])
        assert rows == [1, 1, 2] and result.pred_classes.tolist() == [0, 1, 1]
        assert result.scores.tolist() == [0.75, 0.375, 0.3125]
        assert result.pred_boxes.tensor[2].tolist() == [50.0, 20.0, 96.0, 40.0]

    def test_class_wise_boxes(self):
        boxes = [[0.0, 0.0, 8.0, 8.0, 20.0, 20.0, 40.0, 40.0]]
        result, _ = self.detect([[0.5, 0.75, 0.0]], boxes)
        assert result.pred_boxes.tensor.tolist() == [[20.0, 20.0, 40.0, 40.0], [0.0, 0.0, 8.0, 8.0]]
        assert result.pred_classes.tolist() == [1, 0]

    def test_limit_and_no_limit(self):
        scores = [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.75, 0.75, 0.0]]
        assert len(self.detect(scores, topk=3)[0]) == 3
        assert len(self.detect(scores, topk=-1)[0]) == 4

    def test_rows_that_are_not_finite_are_dropped(self):
        result, _ = self.detect([[math.nan, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.5, 0.0]],
                                [*self.BOXES[:2], [0.0, 0.0, math.inf, 1.0]])
        assert result.pred_boxes.tensor.tolist() == [self.BOXES[1]]

    def test_nothing_above_the_threshold(self):
        result, rows = self.detect([[0.0, 0.0, 1.0]] * 3)
        assert len(result) == 0 and rows == []


class TestGeneralizedRCNN:
    def losses(self, model, batch):
        with EventStorage():
            return model.train()(batch)

    @pytest.mark.parametrize("ground_truths", [(GT, NO_GT), (NO_GT, NO_GT)])
    @pytest.mark.parametrize("agnostic", [False, True])
    def test_every_trainable_parameter_gets_a_gradient(self, ground_truths, agnostic):
        model = make_model("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
        losses = self.losses(model, make_batch(*ground_truths))
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert all(torch.isfinite(loss) and loss.dim() == 0 for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_training_needs_ground_truth(self):
        with pytest.raises((AssertionError, AttributeError, TypeError)):
            self.losses(make_model(), [{"image": torch.zeros(3, *SIZE)}])

    def test_detections_at_the_wanted_size_or_the_network_size(self):
        model = make_model().eval()
        batch = make_batch(GT)
        batch[0].update(height=128, width=288)
        with torch.no_grad():
            scaled = model(batch)[0]["instances"]
            del batch[0]["height"], batch[0]["width"]
            network = model(batch)[0]["instances"]
        assert network.image_size == SIZE and scaled.image_size == (128, 288)
        assert len(network) > 0
        torch.testing.assert_close(
            scaled.pred_boxes.tensor, network.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0]))

    def test_no_proposal_at_all(self):
        model = make_model("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 1000).eval()
        with torch.no_grad():
            outputs = model(make_batch(GT, GT))
        assert [len(output["instances"]) for output in outputs] == [0, 0]
        losses = self.losses(model, make_batch(NO_GT))
        assert losses["loss_cls"].item() == losses["loss_box_reg"].item() == 0

    def test_normalisation_comes_before_padding(self):
        model = make_model("MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0], "MODEL.PIXEL_STD", [1.0, 2.0, 5.0])
        assert not any("pixel" in name for name in model.state_dict())
        images = model.preprocess_image([{"image": torch.full((3, 40, 50), 40.0)}])
        assert images.tensor.shape == (1, 3, 64, 64) and images.image_sizes == [(40, 50)]
        assert images.tensor[0, :, 39, 49].tolist() == [30.0, 10.0, 2.0]
        assert not images.tensor[0, :, 40:].any() and not images.tensor[0, :, :, 50:].any()

    @pytest.mark.skipif(provider.name() == "real", reason="Detectron2 has these features")
    @pytest.mark.parametrize(
        "key", ["MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS", "ROI_BOX_HEAD.USE_SIGMOID_CE"])
    def test_what_is_left_out_is_named(self, key):
        with pytest.raises(NotImplementedError, match=key):
            make_model(f"MODEL.{key}", True)
