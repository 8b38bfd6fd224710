"""A one-stage detector as region proposal network, against loops in double precision, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2_distill.assistants.proposals import DenseProposer, gather_positions, has_position, with_ground_truth
from d2_distill.detectors.box_coders import DeltaCoder, DistanceCoder, DistributionCoder
from d2_distill.staged import DenseRun, StagedDense, stage_detector

from ..small_detectors import NUM_CLASSES, ONE_STAGE, batch, build, detector_cfg

PROPOSER = DenseProposer(pre_nms_topk=60, post_nms_topk=70, nms_thresh=0.5, min_box_size=2.0)


@pytest.fixture(scope="module")
def detectors() -> dict[str, StagedDense]:
    return {case: stage_detector(build(detector_cfg(case), salt=2)) for case in ONE_STAGE}


@pytest.fixture(params=ONE_STAGE)
def staged(request, detectors) -> StagedDense:
    return detectors[request.param]


def start(staged: StagedDense) -> DenseRun:
    """Two images of different sizes."""
    inputs = batch()
    return staged.run(staged.preprocess(inputs), [x["instances"] for x in inputs])


def start_random(staged: StagedDense) -> DenseRun:
    """A run whose predictions are random, some of them extreme and some not finite."""
    run = start(staged)
    generator = torch.Generator().manual_seed(5)
    run.predictions = {
        name: [3 * torch.randn(x.shape, generator=generator) for x in maps]
        for name, maps in run.predictions.items()
    }
    run.predictions["deltas"][0][0, :, 2, 3] = math.nan
    run.predictions["deltas"][1][1, :, 1, 0] = -30.0
    run.predictions["logits"][0][1, 0, 4, 4] = math.inf
    return run


def assert_same_fields(ours: Instances, theirs: Instances) -> None:
    ours, theirs = (
        {name: x.tensor if isinstance(x, Boxes) else x for name, x in rows.get_fields().items()}
        for rows in (ours, theirs)
    )
    assert set(ours) == set(theirs) and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def coder_of(staged: StagedDense):
    model = getattr(staged.model, "detector", staged.model)
    return getattr(model, "box_coder", None) or model.box2box_transform


def slow_decode(coder, outputs: list[float], anchor: list[float], stride: float) -> list[float]:
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    if isinstance(coder, DistributionCoder):
        sides = []
        for side in torch.tensor(outputs, dtype=torch.float64).view(4, -1).softmax(dim=1).tolist():
            sides.append(stride * sum(bin_ * probability for bin_, probability in enumerate(side)))
    elif isinstance(coder, DistanceCoder):
        shape = {"exp": math.exp, "relu": lambda v: stride * max(v, 0.0), "none": lambda v: stride * v}
        sides = [shape[coder.activation](v) for v in outputs]
    elif isinstance(coder, Box2BoxTransformLinear):
        sides = [stride * max(v, 0.0) for v in outputs]
    else:
        two_sided = isinstance(coder, DeltaCoder)
        weights = (coder.transform if two_sided else coder).weights
        dx, dy, dw, dh = (v / weight for v, weight in zip(outputs, weights))
        bound = math.log(1000 / 16)
        dw, dh = min(dw, bound), min(dh, bound)
        if two_sided:
            dw, dh = max(dw, -bound), max(dh, -bound)
        x, y, width, height = x + dx * width, y + dy * height, width * math.exp(dw), height * math.exp(dh)
        sides = [width / 2, height / 2, width / 2, height / 2]
    return [x - sides[0], y - sides[1], x + sides[2], y + sides[3]]


def slow_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_propose(staged: StagedDense, run: DenseRun, image: int, proposer: DenseProposer) -> list[tuple]:
    """Rows (box, logit, position) of an image."""
    coder, (height, width) = coder_of(staged), run.images.image_sizes[image]
    shapes = list(staged.feature_shapes().values())
    kept = []
    for level, shape in enumerate(shapes):
        logits, deltas = (run.predictions[name][level][image].double() for name in ("logits", "deltas"))
        rows, columns = logits.shape[1:]
        anchors = run.grid.level_boxes()[level].tensor.double().view(rows, columns, -1, 4).tolist()
        per_cell = len(anchors[0][0])
        scores, sides = len(logits) // per_cell, len(deltas) // per_cell
        found = []
        for y in range(rows):
            for x in range(columns):
                for a in range(per_cell):
                    logit = max(logits[a * scores : a * scores + NUM_CLASSES, y, x].tolist())
                    found.append((logit, (level, y, x, a)))
        found.sort(key=lambda row: -row[0])
        survivors: list[tuple] = []
        for logit, (_, y, x, a) in found[: proposer.pre_nms_topk]:
            outputs = deltas[a * sides : (a + 1) * sides, y, x].tolist()
            if not all(map(math.isfinite, [logit, *outputs])):
                continue
            box = slow_decode(coder, outputs, anchors[y][x][a], shape.stride)
            box = [min(max(v, 0.0), side) for v, side in zip(box, (width, height, width, height))]
            if min(box[2] - box[0], box[3] - box[1]) <= proposer.min_box_size:
                continue
            if all(slow_iou(box, other) <= proposer.nms_thresh for other, _, _ in survivors):
                survivors.append((box, logit, (level, y, x, a)))
        kept += survivors
    return sorted(kept, key=lambda row: -row[1])[: proposer.post_nms_topk]


@pytest.mark.parametrize("limits", [{}, {"pre_nms_topk": 10**6, "post_nms_topk": 15}])
def test_proposals_against_loops(staged, limits):
    proposer = DenseProposer(**{**vars(PROPOSER), **limits})
    run = start_random(staged)
    found = proposer.propose(run)
    assert [x.image_size for x in found] == run.images.image_sizes and len(set(run.images.image_sizes)) == 2
    for image, proposals in enumerate(found):
        boxes, logits, positions = map(list, zip(*slow_propose(staged, run, image, proposer)))
        assert len({position[0] for position in positions}) > 1
        assert proposals.positions.dtype == torch.int64
        assert proposals.positions.tolist() == [*map(list, positions)]
        torch.testing.assert_close(proposals.objectness_logits, torch.tensor(logits))
        torch.testing.assert_close(proposals.proposal_boxes.tensor, torch.tensor(boxes), rtol=1e-4, atol=1e-3)


def test_boxes_are_decoded_in_single_precision(staged):
    """From outputs in half precision, as autocast makes them."""
    run, half = start_random(staged), start(staged)
    rounded = {name: [x.bfloat16() for x in maps] for name, maps in run.predictions.items()}
    half.predictions = rounded
    run.predictions = {name: [x.float() for x in maps] for name, maps in rounded.items()}
    for ours, expected in zip(PROPOSER.propose(half), PROPOSER.propose(run)):
        assert ours.objectness_logits.dtype == ours.proposal_boxes.tensor.dtype == torch.float32
        assert_same_fields(ours, expected)


def test_proposing_first_leaves_the_losses_their_gradient(detectors):
    staged = detectors["OpenMMLabRetinaNet"]
    run = start(staged)
    proposals = PROPOSER.propose(run)
    tensors = [t for x in proposals for t in (x.proposal_boxes.tensor, x.objectness_logits)]
    assert not any(tensor.requires_grad for tensor in tensors)
    with EventStorage():
        sum(run.losses.values()).backward()
    assert all(p.grad is not None for p in staged.model.parameters() if p.requires_grad)


def test_options_come_from_the_region_proposal_network_of_the_config():
    cfg = get_cfg()
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 11, 7
    cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 0.6, 3
    assert DenseProposer.from_cfg(cfg) == DenseProposer(11, 7, nms_thresh=0.6, min_box_size=3)


def truth_of(inputs) -> list[Instances]:
    return [x["instances"] for x in inputs]


def sample(proposals: list[Instances], truth: list[Instances]) -> list[Instances]:
    """Detectron2's sampling of RoI heads that do not add ground truth themselves."""
    cfg = get_cfg()
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.IN_FEATURES, heads.NUM_CLASSES, heads.PROPOSAL_APPEND_GT = ["p3"], NUM_CLASSES, False
    heads.BATCH_SIZE_PER_IMAGE = 12
    box_head.NAME, box_head.NUM_FC, box_head.FC_DIM = "FastRCNNConvFCHead", 1, 8
    roi_heads = StandardROIHeads(cfg, {"p3": ShapeSpec(channels=1, stride=8)})
    with EventStorage():
        return roi_heads.label_and_sample_proposals(proposals, truth)


def test_ground_truth_in_front(detectors):
    run, truth = start_random(detectors["FCOS"]), truth_of(batch())
    proposals = PROPOSER.propose(run)
    for pool, found, objects in zip(with_ground_truth(proposals, truth), proposals, truth):
        number = len(objects)
        assert number > 0
        assert torch.equal(pool.proposal_boxes.tensor[:number], objects.gt_boxes.tensor)
        assert pool.positions[:number].tolist() == [[-1, -1, -1, index] for index in range(number)]
        assert (pool.objectness_logits[:number] > 20).all()
        assert_same_fields(pool[number:], found)


def test_ground_truth_has_detectron2s_objectness(detectors):
    (found, _), truth = PROPOSER.propose(start_random(detectors["FCOS"])), truth_of(batch())[:1]
    plain = Instances(
        found.image_size, proposal_boxes=found.proposal_boxes, objectness_logits=found.objectness_logits
    )
    (theirs,) = add_ground_truth_to_proposals(truth, [plain])
    (ours,) = with_ground_truth([found], truth)
    number = len(truth[0])
    assert torch.equal(ours.objectness_logits[:number], theirs.objectness_logits[-number:])


def test_positions_survive_detectron2s_sampling(detectors):
    run, truth = start_random(detectors["RetinaNet"]), truth_of(batch())
    pools = with_ground_truth(PROPOSER.propose(run), truth)
    sampled = sample(pools, truth)
    assert [len(x) for x in sampled] == [12, 12]
    for pool, rows in zip(pools, sampled):
        rows_of_pool = zip(pool.positions.tolist(), pool.proposal_boxes)
        origins = {tuple(position): box for position, box in rows_of_pool}
        for position, box in zip(rows.positions.tolist(), rows.proposal_boxes):
            assert torch.equal(origins[tuple(position)], box)
        truths = rows.positions[:, 0] < 0
        assert truths.any() and (rows.gt_classes[truths] < NUM_CLASSES).all()
        assert torch.equal(has_position([rows.positions]), ~truths)


@pytest.mark.parametrize("nothing_proposed", [False, True])
@pytest.mark.parametrize("has_truth", [False, True])
def test_images_with_nothing(detectors, nothing_proposed, has_truth):
    run = start_random(detectors["OpenMMLabRetinaNet"])
    proposer = DenseProposer(60, 70, nms_thresh=0.5, min_box_size=1000 if nothing_proposed else 0)
    truth = truth_of(batch())
    if not has_truth:
        truth = [x[:0] for x in truth]
    proposals = proposer.propose(run)
    assert all((len(x) == 0) == nothing_proposed for x in proposals)
    assert all(x.positions.shape == (len(x), 4) and x.positions.dtype == torch.int64 for x in proposals)
    sampled = sample(with_ground_truth(proposals, truth), truth)
    for rows, objects in zip(sampled, truth):
        assert len(rows) == (len(objects) if nothing_proposed else 12)
        assert has_truth or (rows.gt_classes == NUM_CLASSES).all()
    positions = [rows.positions for rows in sampled]
    maps = [x.requires_grad_() for x in run.predictions["logits"]]
    vectors = gather_positions(maps, positions)
    assert vectors.shape == (int(has_position(positions).sum()), maps[0].shape[1])
    assert (len(vectors) == 0) == nothing_proposed
    vectors.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in maps)


def test_gathering_against_loops():
    """Positions repeat, and their gradients add up."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 6), (2, 3), (1, 2)]
    maps = [torch.randn(3, 5, *size, generator=generator, dtype=torch.float64) for size in sizes]
    positions = []
    for count in (40, 0, 25):
        levels = torch.randint(-1, 3, (count,), generator=generator).tolist()
        rows = [[level, *(int(torch.randint(side, (), generator=generator)) for side in sizes[level]), 8]
                for level in levels]
        positions.append(torch.tensor(rows, dtype=torch.int64).view(-1, 4))
    factors = torch.randn(sum(map(len, positions)), 5, generator=generator, dtype=torch.float64)

    expected, gradients, mask = [], [torch.zeros_like(x) for x in maps], []
    for image, rows in enumerate(positions):
        for level, y, x, _ in rows.tolist():
            mask.append(level >= 0)
            if level >= 0:
                gradients[level][image, :, y, x] += factors[len(expected)]
                expected.append(maps[level][image, :, y, x])
    assert 0 < len(expected) < len(mask)

    maps = [x.requires_grad_() for x in maps]
    gathered = gather_positions(maps, positions)
    assert torch.equal(gathered, torch.stack(expected))
    assert has_position(positions).tolist() == mask
    (gathered * factors[: len(gathered)]).sum().backward()
    for x, gradient in zip(maps, gradients):
        torch.testing.assert_close(x.grad, gradient)
