"""VOC evaluation: Detectron2's numbers in one convention, OpenMMLab's rules, written slowly, in the other."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator

from d2_distill.config.keys import get_distill_cfg
from d2_distill.data.problems import refusing
from d2_distill.data.voc_files import read_voc
from d2_distill.engine.setup import setup
from d2_distill.engine.trainer import Trainer
from d2_distill.errors import UserError
from d2_distill.evaluation.voc import VOCEvaluator, objects_of_records, read_objects

from ..data import small_sets
from ..embedded.detection_data import empty_output, outputs_of, registered, write_voc

NAME = "test_voc"
CLASSES = ["cat", "dog", "cow"]
KEYS = ["AP", "AP50", "AP75", "AP55", "AP60", "AP65", "AP70", "AP80", "AP85", "AP90", "AP95"]
CLASS_KEYS = [f"AP-{name}" for name in CLASSES]


def _random_set(seed, classes=CLASSES, num_images=15):
    """Objects of a VOC folder, difficult ones among them; detections near them and elsewhere.

    No two scores of a class are equal after rounding: their order would be left to the sorting.
    """
    rng = np.random.RandomState(seed)
    image_ids = [f"{number:06d}" for number in range(num_images)]
    objects, detections = [], []
    scores = {k: iter(rng.permutation(1000) / 1000) for k in range(len(classes))}
    for image_id in image_ids:
        for _ in range(rng.randint(0, 8)):
            x0, y0 = rng.randint(1, 60, 2)
            box = [int(x0), int(y0), int(x0 + rng.randint(0, 40)), int(y0 + rng.randint(5, 40))]
            k = int(rng.randint(len(classes)))
            objects.append((image_id, classes[k], box, bool(rng.rand() < 0.2)))
            for _ in range(rng.randint(0, 4)):
                found = np.array(box) - [1, 1, 0, 0] + rng.choice([0.5, 3]) * rng.randn(4)
                found[2:] = np.maximum(found[2:], found[:2] + 0.1)
                found_class = k if rng.rand() < 0.9 else 0
                detections.append((image_id, found.tolist(), float(next(scores[found_class])), found_class))
        for _ in range(3):
            x0, y0, width, height = rng.rand(4) * 50
            k = int(rng.randint(len(classes)))
            detections.append((image_id, [x0, y0, x0 + width, y0 + height], float(next(scores[k])), k))
    return image_ids, objects, detections


def _evaluate(evaluator, detections):
    evaluator.reset()
    for given, output in outputs_of(detections):
        evaluator.process([given], [output])
    return evaluator.evaluate()


@pytest.fixture
def voc(tmp_path):
    """Registers a data set of given objects, for the time of a test."""
    exits = []

    def write(image_ids, objects, year=2007, classes=CLASSES):
        write_voc(tmp_path / "voc", "test", image_ids, (100, 100), objects)
        manager = registered(NAME, register_pascal_voc, str(tmp_path / "voc"), "test", year, list(classes))
        exits.append(manager)
        return manager.__enter__()

    yield write
    for manager in exits:
        manager.__exit__(None, None, None)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_devkit_equals_detectron2(voc, seed, year):
    image_ids, objects, detections = _random_set(seed)
    voc(image_ids, objects, year)
    expected = _evaluate(PascalVOCDetectionEvaluator(NAME), detections)["bbox"]
    actual = _evaluate(VOCEvaluator(NAME, "devkit"), detections)["bbox"]
    assert 10 < expected["AP"] < 90
    assert list(actual) == KEYS + CLASS_KEYS
    for metric, value in expected.items():
        assert actual[metric] == pytest.approx(value, rel=1e-9)
    for keys in (KEYS[1:], CLASS_KEYS):
        assert actual["AP"] == pytest.approx(np.mean([actual[metric] for metric in keys]), rel=1e-9)


@pytest.mark.parametrize("year", [2007, 2012])
def test_devkit_equals_detectron2_where_a_class_has_no_objects(voc, year):
    image_ids, objects, detections = _random_set(3)
    voc(image_ids, [row for row in objects if row[1] != "cow"], year)
    for rows in (detections, [row for row in detections if row[3] != 2]):
        expected = _evaluate(PascalVOCDetectionEvaluator(NAME), rows)["bbox"]
        actual = _evaluate(VOCEvaluator(NAME, "devkit"), rows)["bbox"]
        for metric, value in expected.items():
            assert actual[metric] == pytest.approx(value, rel=1e-9, nan_ok=True)


def _iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (a, b)]
    return intersection / max(sum(areas) - intersection, 1e-12)


def _slow_ap(objects, detections, threshold, eleven_points):
    """OpenMMLab's rules for one class; detections in the coordinates of the files."""
    num_objects = sum(not difficult for _, _, _, difficult in objects)
    found, right, wrong, curve = set(), 0, 0, []
    for image_id, box, _, _ in sorted(detections, key=lambda row: -row[2]):
        candidates = [(i, row) for i, row in enumerate(objects) if row[0] == image_id]
        index, best = max(candidates, key=lambda pair: _iou(box, pair[1][2]), default=(None, None))
        if best is None or _iou(box, best[2]) < threshold:
            wrong += 1
        elif not best[3]:
            wrong += index in found
            right += index not in found
            found.add(index)
        curve.append((right / num_objects, right / max(right + wrong, 1)))
    if eleven_points:
        bests = [max((p for r, p in curve if r >= i * 0.1), default=0) for i in range(11)]
        return sum(bests) / 11
    area, last = 0, 0
    for place, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[place:])
        last = recall
    return area


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", [0, 1])
def test_openmmlab_equals_a_loop(voc, seed, year):
    image_ids, objects, detections = _random_set(seed)
    voc(image_ids, objects, year)
    actual = _evaluate(VOCEvaluator(NAME, "openmmlab"), detections)["bbox"]
    # float32, as detections are
    written = [
        (image_id, np.float32(box).astype(float) + [1, 1, 0, 0], np.float32(score), k)
        for image_id, box, score, k in detections
    ]
    threshold, means = 0.5, []
    for percent in range(50, 100, 5):
        aps = [
            _slow_ap(
                [row for row in objects if row[1] == name],
                [row for row in written if row[3] == k],
                threshold,
                year == 2007,
            )
            for k, name in enumerate(CLASSES)
        ]
        means.append(100 * np.mean(aps))
        assert actual[f"AP{percent}"] == pytest.approx(means[-1], rel=1e-9)
        threshold += 0.05
    assert actual["AP"] == pytest.approx(np.mean(means), rel=1e-9)
    assert 10 < actual["AP"] < 90


@pytest.mark.parametrize("convention", ["devkit", "openmmlab"])
@pytest.mark.parametrize("year", [2007, 2012])
def test_what_the_loader_gives_is_a_perfect_prediction(voc, convention, year):
    image_ids, objects, _ = _random_set(4)
    objects = [(*row[:2], [*row[2][:2], row[2][2] + 1, row[2][3]], row[3]) for row in objects]
    voc(image_ids, objects, year)
    evaluator = VOCEvaluator(NAME, convention)
    for record in DatasetCatalog.get(NAME):
        rows = [(record["image_id"], x["bbox"], 0.9, x["category_id"]) for x in record["annotations"]]
        for given, output in outputs_of(rows):
            evaluator.process([given], [output])
    results = evaluator.evaluate()["bbox"]
    assert list(results) == KEYS + CLASS_KEYS
    assert all(value == pytest.approx(100.0) for value in results.values())


def test_rules_that_differ(voc):
    """An IoU of exactly 0.5 in each convention's own measure, and a class without objects."""
    objects = [("a", "cat", [11, 11, 30, 20], False), ("b", "cat", [11, 11, 31, 20], False)]
    voc(["a", "b"], objects)
    # by pixels 10 of the 20 columns of a; by coordinates 10 of the 20 pixels of b's width
    detections = [("a", [10, 10, 20, 20], 0.9, 0), ("b", [10, 10, 21, 20], 0.8, 0)]

    def ap50(convention, *rows):
        return _evaluate(VOCEvaluator(NAME, convention), rows)["bbox"]["AP50"]

    ap_of_one_in_two = 100 * 6 / 11
    assert ap50("openmmlab", detections[1]) == pytest.approx(ap_of_one_in_two)  # 0.5 is enough
    assert ap50("openmmlab", detections[0]) == 0  # 9 / 19
    assert ap50("devkit", detections[0]) == 0  # 0.5 is not enough
    assert ap50("devkit", detections[1]) == pytest.approx(ap_of_one_in_two / 3)  # 11 / 21; dog and cow have 0


def test_no_object_at_all(voc):
    voc(["a"], [("a", "cat", [1, 1, 9, 9], True)])
    rows = [("a", [0.0, 0, 9, 9], 0.9, 0), ("a", [40.0, 40, 60, 60], 0.8, 0)]
    openmmlab, devkit = (_evaluate(VOCEvaluator(NAME, name), rows)["bbox"] for name in ("openmmlab", "devkit"))
    for metric in ("AP", "AP-cat"):
        assert np.isnan(openmmlab[metric]) and devkit[metric] == 0


def test_nothing_detected_and_nothing_processed(voc):
    voc(["a"], [("a", "cat", [1, 1, 9, 9], False)])
    for convention in ("devkit", "openmmlab"):
        evaluator = VOCEvaluator(NAME, convention)
        assert evaluator.evaluate() == {}
        evaluator.process([{"image_id": "a"}], [empty_output()])
        found = evaluator.evaluate()["bbox"]
        assert {key: found[key] for key in (*KEYS, "AP-cat")} == dict.fromkeys((*KEYS, "AP-cat"), 0.0)


def test_log_and_selection_by_the_config(voc, caplog):
    image_ids, objects, detections = _random_set(5)
    voc(image_ids, objects)
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
    cfg = get_distill_cfg()
    results = {}
    for convention in ("devkit", "openmmlab"):
        cfg.TEST.VOC_CONVENTION = convention
        with caplog.at_level(logging.INFO, logger="d2_distill.evaluation.voc"):
            metrics = _evaluate(Trainer.build_evaluator(cfg, NAME), detections)["bbox"]
        results[convention] = metrics["AP"]
        summary, per_class = (record.getMessage() for record in caplog.records[-2:])
        for percent in range(50, 100, 5):
            assert f"AP{percent}" in summary and f"{metrics[f'AP{percent}']:.3f}" in summary
        assert all(name in per_class for name in CLASSES)
        printed = [float(line.split()[-1]) for line in per_class.splitlines()[3:]]
        assert np.mean(printed) == pytest.approx(metrics["AP50"], abs=1e-3)
    assert results["devkit"] != results["openmmlab"]


def test_unknown_convention_is_refused_before_training():
    args = argparse.Namespace(config_file="", opts=["TEST.VOC_CONVENTION", "coco"], eval_only=False)
    with pytest.raises(UserError, match="TEST.VOC_CONVENTION is 'coco'; choose one of devkit, openmmlab"):
        setup(args)


def _evaluate_in_process(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    _, _, detections = _random_set(6)
    register_pascal_voc(NAME, str(folder / "voc"), "test", 2007, CLASSES)
    own = [row for row in detections if int(row[0]) % 2 == rank]
    outcome = _evaluate(VOCEvaluator(NAME, "openmmlab"), own)
    results[rank] = outcome if outcome is None else dict(outcome["bbox"])
    torch.distributed.destroy_process_group()


def test_predictions_of_all_processes_are_gathered(voc, tmp_path):
    image_ids, objects, detections = _random_set(6)
    voc(image_ids, objects)
    alone = _evaluate(VOCEvaluator(NAME, "openmmlab"), detections)["bbox"]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_evaluate_in_process, args=(tmp_path, results), nprocs=2)
        together = dict(results)
    assert together[1] is None
    assert together[0] == pytest.approx(alone, rel=1e-12)


def test_objects_of_records_are_those_of_the_files(tmp_path):
    """Of a split without objects, of difficult ones, and of corners between pixels."""
    name = small_sets.write_voc(tmp_path, objects=([("cat", 3, 4, 10, 9), ("dog", 1.5, 4, 30, 20)], [], [("dog", 2, 2, 9, 9)]))[0]
    path = tmp_path / "Annotations" / "2.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    records = read_voc(str(tmp_path), "train", ["cat", "dog", "cow"], refusing(name))
    ours = objects_of_records(records, 3)
    theirs = read_objects(str(tmp_path), "train", ["cat", "dog", "cow"])
    assert ours[0] == theirs[0] == ["0", "1", "2"]
    for left, right in zip(ours[1], theirs[1]):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right))
    assert [len(each.images) for each in ours[1]] == [1, 2, 0] and ours[1][1].difficult.tolist() == [False, True]
