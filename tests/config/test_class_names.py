"""Teachers that know other classes: which of them are the student's, and that nothing else changes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill import provider
from d2_distill.config.class_names import describe_match, match_classes
from d2_distill.detectors.roi_heads import StagedRoIHeads
from d2_distill.detectors.stock import StagedRetinaNet
from d2_distill.distiller import Distiller
from d2_distill.errors import UserError
from d2_distill.staged import StagedDense, StagedDetector, stage_detector
from d2_distill.teacher import Teacher

from ..same_detections import assert_same_detections
from ..small_detectors import (
    CASES,
    ONE_STAGE,
    SavedTeacher,
    allowed_methods,
    batch,
    build,
    detector_cfg,
    distiller_cfg,
    save_teacher,
)

OURS, THEIRS = ["cat", "dog", "cow"], ["horse", "dog", "cow", "sheep", "cat"]
KEPT = [4, 1, 2]
FAMILIES = ("RETINANET", "FCOS", "ATSS", "GFL", "TOOD", "ROI_HEADS")
SUPERSET = {f"{family}__NUM_CLASSES": len(THEIRS) for family in FAMILIES}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers of the five classes, by case; made when a test asks."""
    saved = {}

    def of(case: str) -> SavedTeacher:
        if case not in saved:
            saved[case] = save_teacher(tmp_path_factory.mktemp("teacher"), case, **SUPERSET)
        return saved[case]

    return of


def cfg_of(case, teacher, methods=(), ours=OURS, theirs=THEIRS, **overrides):
    """Config of a distiller; the student's classes and the teacher's are those, unknown if empty."""
    opts = ["DATASETS.CLASSES", tuple(theirs)]
    cfg = distiller_cfg(case, teacher, methods, DISTILL__TEACHER__OPTS=opts, **overrides)
    cfg.DATASETS.CLASSES = tuple(ours)
    return cfg


def distiller(*args, **kwargs) -> Distiller:
    torch.manual_seed(0)
    return build_model(cfg_of(*args, **kwargs)).prepare_training().train()


@pytest.mark.parametrize(
    "theirs, aliases, expected",
    [
        (THEIRS, (), KEPT),
        (OURS, (), [0, 1, 2]),
        (["Dog", "cat", "COW"], (), [1, 0, 2]),
        (["dog", "cow"], (), [None, 0, 1]),
        (["kitten", "dog", "cow"], ("cat=kitten",), [0, 1, 2]),
        (["cat", "kitten", "dog", "cow"], ("cat=kitten",), [1, 2, 3]),
        (["Cat", "CAT", "dog", "cow"], (), [None, 2, 3]),
        (["Cat", "CAT", "cat", "dog", "cow"], (), [2, 3, 4]),
    ],
)
def test_names(theirs, aliases, expected):
    assert match_classes(OURS, theirs, aliases) == expected


def test_names_that_are_written_otherwise():
    ours, theirs = ["hot dog", "Traffic_Light", "tvmonitor"], ["tv", "traffic light", "hotdog"]
    found = match_classes(ours, theirs)
    assert found == [2, 1, None] and match_classes(["cat", "Cat"], ["cat"]) == [0, None]
    assert describe_match(ours, theirs, found) == (
        "2 of its 3 classes, by name (hot dog=hotdog, Traffic_Light=traffic light)"
    )


@pytest.mark.parametrize(
    "ours, aliases, message",
    [
        (OURS, ("cat",), "has 'cat'; write 'student name=teacher name'"),
        (OURS, ("cat=bus",), "has 'cat=bus', but the teacher has no class 'bus'; it knows horse, dog, cow"),
        (OURS, ("cat=cta",), "has 'cat=cta', but the teacher has no class 'cta'; .*did you mean cat"),
        (OURS, ("ca=cat",), "has 'ca=cat', but the student has no class 'ca'; .*did you mean cat"),
        (OURS, ("cat=dog",), "the student's classes 'cat' and 'dog' would both be the teacher's 'dog'"),
    ],
)
def test_names_that_cannot_be_matched(ours, aliases, message):
    with pytest.raises(UserError, match=f"MODEL.DISTILL.TEACHER.CLASS_ALIASES:? {message}"):
        match_classes(ours, THEIRS, aliases)


@pytest.fixture(scope="module", params=CASES)
def models(request):
    """A detector that keeps all that it finds, and one made of it that knows three of its five classes."""
    everything = {f"{family}__TOPK_CANDIDATES_TEST": 100000 for family in FAMILIES if family != "ROI_HEADS"}
    cfg = detector_cfg(request.param, **SUPERSET, **everything)
    cfg.TEST.DETECTIONS_PER_IMAGE = 100000
    model = build(cfg, salt=2).eval()
    fewer = copy.deepcopy(model)
    stage_detector(fewer).keep_classes(KEPT)
    return model, fewer


def test_raw_outputs_are_the_selected_ones(models):
    runs = []
    for model in models:
        staged = stage_detector(model)
        runs.append(staged.run(staged.preprocess(batch()), [x["instances"] for x in batch()], frozen=True))
    assert [run.staged.num_classes for run in runs] == [5, 3]
    if isinstance(runs[0].staged, StagedDense):
        full, fewer = (dict(run.outputs) for run in runs)
        extra = full["logits"].shape[-1] - 5
        full["logits"] = full["logits"][..., [*KEPT, *range(5, 5 + extra)]]
        torch.testing.assert_close(fewer, full)
        scores = [runs[0].staged.class_scores(full), runs[1].staged.class_scores(fewer)]
        torch.testing.assert_close(*scores)
        return
    boxes = [x["instances"].gt_boxes for x in batch()]
    views = [StagedRoIHeads(model.roi_heads) for model in models]
    for index in range(views[0].num_stages):
        full, fewer = (view.stage(index, runs[0].features, boxes) for view in views)
        expected = full.logits.softmax(dim=1)[:, KEPT]
        found = fewer.logits.softmax(dim=1)
        torch.testing.assert_close(found[:, :-1], expected)
        torch.testing.assert_close(found[:, -1], 1 - expected.sum(dim=1))
        deltas = full.deltas if full.deltas.shape[1] == 4 else full.deltas.unflatten(1, (5, 4))[:, KEPT].flatten(1)
        torch.testing.assert_close(fewer.deltas, deltas)


def test_detections_are_the_selected_ones(models):
    with torch.no_grad():
        full, fewer = (model(batch()) for model in models)
    for expected, found in zip(full, fewer):
        expected, found = expected["instances"], found["instances"]
        mine = torch.isin(expected.pred_classes, torch.tensor(KEPT))
        assert 0 < mine.sum() < len(mine)
        expected = expected[mine]
        found.pred_classes = torch.tensor(KEPT)[found.pred_classes]
        assert_same_detections(found, expected)


@pytest.mark.skipif(provider.name() == "embedded", reason="the embedded Detectron2 has no masks")
@pytest.mark.parametrize("agnostic", [False, True])
def test_masks_are_the_selected_ones(agnostic):
    masks = {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 1, "CONV_DIM": 8, "POOLER_RESOLUTION": 7}
    keys = {f"ROI_MASK_HEAD__{key}": value for key, value in masks.items()}
    cfg = detector_cfg(
        "GeneralizedRCNN", **SUPERSET, **keys, ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=agnostic, MASK_ON=True,
        ROI_HEADS__SCORE_THRESH_TEST=0.0,
    )
    cfg.TEST.DETECTIONS_PER_IMAGE = 100000
    model = build(cfg, salt=2).eval()
    with torch.no_grad():
        expected = model(batch())[0]["instances"]
        stage_detector(model).keep_classes(KEPT)
        found = model(batch())[0]["instances"]
    expected = expected[torch.isin(expected.pred_classes, torch.tensor(KEPT))]
    assert len(found) == len(expected) > 0 and torch.equal(found.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_with_more_classes(case, teachers):
    """One step; the teacher stays as it is."""
    student = "GeneralizedRCNN" if case == "GeneralizedRCNN cascade" else case
    methods = [name for name in allowed_methods(student, case) if (case, name) != ("MultiScaleDetector", "HEAD")]
    methods += ["LD"] if case.startswith("GFL") or "distributions" in case else []
    model = distiller(student, teachers(case), methods)
    before = model.teacher.fingerprint()
    assert model.teacher.classes == OURS and model.teacher.staged.num_classes == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with EventStorage():
        losses = model(batch())
    assert len(losses) > len(methods) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


@pytest.mark.parametrize("case", ["RetinaNet", "GeneralizedRCNN", "GeneralizedRCNN cascade"])
def test_config_and_model_agree(case, teachers):
    """HEAD's assistant is built by the teacher's config and starts with its weights."""
    student = "GeneralizedRCNN" if case in ONE_STAGE else "RetinaNet"
    model = distiller("RetinaNet" if case in ONE_STAGE else student, teachers(case), ["HEAD"])
    rebuilt = build(model.teacher.cfg)
    theirs = model.teacher.model.state_dict()
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == {
        name: theirs[name].shape for name in rebuilt.state_dict()
    }
    if case in ONE_STAGE:
        return
    assistant = model.methods["HEAD"].setting.assistant
    assert assistant.roi_heads.num_classes == 3
    assert all(torch.equal(value, theirs[f"roi_heads.{n}"]) for n, value in assistant.roi_heads.state_dict().items())


@pytest.mark.parametrize(
    "case, module, layer",
    [
        ("RetinaNet", "head", "cls_score"),
        ("GFLv2", "head", "cls_score"),
        ("GeneralizedRCNN", "roi_heads", "box_predictor.cls_score"),
    ],
)
def test_students_inherit_their_classes(case, module, layer, teachers):
    model = distiller(case, teachers(case), ["PKD"], DISTILL__INHERIT=(module,))
    whole = torch.load(teachers(case).weights, weights_only=True)["model"][f"{module}.{layer}.bias"]
    per_anchor = whole.view(-1, 6 if case != "RetinaNet" else 5)
    columns = KEPT if case == "RetinaNet" else [*KEPT, 5]
    mine = model.student.state_dict()[f"{module}.{layer}.bias"]
    assert torch.equal(mine, per_anchor[:, columns].flatten())


def test_equal_lists_change_nothing(tmp_path):
    saved = save_teacher(tmp_path, "GeneralizedRCNN")
    plain = Teacher.from_config(cfg_of("GeneralizedRCNN", saved, ours=(), theirs=()))
    named = Teacher.from_config(cfg_of("GeneralizedRCNN", saved, theirs=OURS))
    assert named.fingerprint() == plain.fingerprint() and list(named.classes) == OURS and not plain.classes


def test_another_order_is_put_right(tmp_path, caplog):
    saved = save_teacher(tmp_path, "GeneralizedRCNN")
    logger = logging.getLogger("d2_distill.teacher")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    teacher = Teacher.from_config(cfg_of("GeneralizedRCNN", saved, theirs=["dog", "Cow", "cat"]))
    logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert lines[0] == "Teacher: 3 of its 3 classes, by name (cow=Cow)"
    assert teacher.fingerprint() in lines[-1]
    whole = torch.load(saved.weights, weights_only=True)["model"]["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(teacher.model.roi_heads.box_predictor.cls_score.bias, whole[[2, 0, 1, 3]])


def test_classes_that_the_teacher_lacks(teachers):
    theirs = ["horse", "dog", "cow", "sheep", "kitten"]
    model = distiller("RetinaNet", teachers("RetinaNet"), ["PKD", "FeatureImitation"], theirs=theirs)
    assert model.teacher.lacks == ["cat"] and model.teacher.staged.num_classes == 5
    with EventStorage():
        assert all(loss.isfinite() for loss in model(batch()).values())
    fresh = {"DISTILL__HEAD__ASSISTANT_INIT": "fresh"}
    assert distiller("RetinaNet", teachers("ATSS"), ["HEAD"], theirs=theirs, **fresh).teacher.lacks == ["cat"]
    message = "CrossKD compares class scores, but the teacher does not know 1 of the student's classes, 'cat'"
    with pytest.raises(UserError, match=message):
        distiller("RetinaNet", teachers("RetinaNet"), ["CrossKD"], theirs=theirs)
    alias = {"DISTILL__TEACHER__CLASS_ALIASES": ("cat=kitten",)}
    assert distiller("RetinaNet", teachers("RetinaNet"), ["CrossKD"], theirs=theirs, **alias).teacher.classes == OURS


def test_names_that_are_not_known(teachers, tmp_path):
    message = "student has 3 classes and the teacher 5; name the classes of both"
    for known in ({"theirs": ()}, {"ours": ()}):
        with pytest.raises(UserError, match=message):
            distiller("RetinaNet", teachers("RetinaNet"), ["CrossKD"], **known)
        alias = {"DISTILL__TEACHER__CLASS_ALIASES": ("cat=cat",)}
        side = "teacher" if "theirs" in known else "student"
        with pytest.raises(UserError, match=f"CLASS_ALIASES is set, but the class names of the {side} are not known"):
            distiller("RetinaNet", teachers("RetinaNet"), ["PKD"], **known, **alias)
    saved = save_teacher(tmp_path, "RetinaNet")
    assert distiller("RetinaNet", saved, ["CrossKD"], theirs=()).teacher.staged.num_classes == 3


def test_coco_is_known_without_its_files(tmp_path):
    """A teacher of the 80 classes needs nothing but the name of its data set."""
    saved = save_teacher(tmp_path, "RetinaNet", RETINANET__NUM_CLASSES=80)
    cfg = cfg_of("RetinaNet", saved, ["CrossKD"], theirs=())
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", ("coco_2017_train",)]
    torch.manual_seed(0)
    teacher = build_model(cfg).prepare_training().teacher
    assert teacher.cfg.DATASETS.CLASSES == tuple(OURS) and teacher.cfg.MODEL.RETINANET.NUM_CLASSES == 3
    whole = torch.load(saved.weights, weights_only=True)["model"]["head.cls_score.bias"].view(6, 80)
    names = MetadataCatalog.get("coco_2017_train").thing_classes
    columns = [names.index(name) for name in OURS]
    assert torch.equal(teacher.model.head.cls_score.bias, whole[:, columns].flatten())


def test_teacher_that_cannot_be_reduced(teachers, caplog, monkeypatch):
    """It teaches what compares no classes; classes in another order would be mistaken for one another."""
    monkeypatch.setattr(StagedRetinaNet, "keep_classes", StagedDetector.keep_classes)
    with caplog.at_level(logging.WARNING, logger="d2_distill.teacher"):
        model = distiller("RetinaNet", teachers("RetinaNet"), ["PKD"])
    assert "RetinaNet cannot be reduced to them, as its staged adapter defines no keep_classes" in caplog.text
    assert model.teacher.staged.num_classes == len(THEIRS) and model.teacher.classes == THEIRS
    with pytest.raises(UserError, match="the student has 3 classes and the teacher 5"):
        distiller("RetinaNet", teachers("RetinaNet"), ["CrossKD"])
    five = {"RETINANET__NUM_CLASSES": len(THEIRS)}
    with pytest.raises(UserError, match="has the student's classes in another order.*teacher's order: horse, dog, cow"):
        distiller("RetinaNet", teachers("RetinaNet"), ["PKD"], ours=sorted(THEIRS), **five)
