"""train_net.py --list: what it tells of pairs is what the methods accept, and nothing registered is missing."""

from __future__ import annotations

import re

import pytest
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.listing import list_backbones, list_detectors, pairs, print_choices, print_pair
from d2_distill.methods import DISTILL_METHOD_REGISTRY, DistillMethod, list_methods, refusals
from d2_distill.methods.pairing import require_teacher
from d2_distill.staged import adapter_of, list_staged, stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import CASES, allowed_methods, build, detector_cfg, distiller_cfg, save_teacher

R_CNN_ASSISTANT = {
    "ROI_HEADS__NAME": "StandardROIHeads",
    "ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD__NUM_FC": 2,
    "ROI_BOX_HEAD__FC_DIM": 32,
}
NO_ASSISTANTS = ("DENSE", "RCNN", "CROSS_DENSE", "CROSS_RCNN")  # which take most of the time
VARIANTS = {"BN": "", "distributions": " (REG_MAX)", "cascade": " (CascadeROIHeads)"}


def label(case: str) -> str:
    """What the listing calls a test's detector."""
    name, _, variant = case.partition(" ")
    return name + VARIANTS.get(variant, "")


@pytest.fixture(scope="module")
def detectors():
    found, failed = list_detectors(get_distill_cfg())
    assert not failed
    return found


@pytest.fixture(scope="module")
def table(detectors):
    return pairs(detectors)


def test_every_detector_is_listed(detectors):
    names = [detector.label for detector in detectors]
    assert len(names) == len(set(names)) and {name.split()[0] for name in names} >= set(list_staged())
    assert {label(case) for case in CASES} <= set(names)


def test_pairs_are_those_that_the_methods_accept(table):
    """Other backbones, widths, levels and anchors than the listing's."""
    built = {case: stage_detector(build(detector_cfg(case))) for case in CASES}
    for student, ours in built.items():
        options = {} if "RCNN" in student else R_CNN_ASSISTANT
        cfg = distiller_cfg(student, None, **options)
        for case in (None, *CASES):
            teacher = None
            if case is not None:
                teacher = Teacher(built[case].model, input_format="BGR", cfg=detector_cfg(case))
            found = refusals(cfg, ours, teacher)
            accepted = {name for name, refusal in found.items() if refusal is None}
            assert accepted == table[label(student), case and label(case)], (student, case, found)


def test_pairs_of_the_documentation(table):
    found = {teacher for (student, teacher), names in table.items() if student == "GFL" and "LD" in names}
    # Golden tests register detectors of their own.
    assert found & {label(case) for case in CASES} == {"GFL", "GFLv2", "ATSS (REG_MAX)"}
    for student in CASES:
        for teacher in ("RetinaNet", "GeneralizedRCNN"):
            assert set(allowed_methods(student, teacher)) <= table[label(student), teacher]
    assert table["RetinaNet", None] == {"TFHEAD"} and not table["GeneralizedRCNN", None]


def test_backbones_and_their_pyramids():
    found = list_backbones(get_distill_cfg())
    assert set(found) == {name for name, _ in BACKBONE_REGISTRY} - {"StudentFeatures"}
    assert found["build_resnet_fpn_backbone"].startswith("pyramid of p2, p3, p4, p5, p6.")
    ours = {name: text for name, text in found.items() if re.match("build_.*(fpn|low_resolution)", name)}
    assert len(ours) >= 9 and all(text.startswith("pyramid of p2, ") or "p3, " in text for text in ours.values())
    assert found["build_resnet_backbone"].startswith("no pyramid.")


class OwnMethod(DistillMethod):
    """A method of the user's own.

    It is for GFL alone.
    """

    @classmethod
    def from_config(cls, cfg, student, teacher):
        require_teacher(teacher, "OwnMethod")
        return {"GFL": {}}[student.kind]  # KeyError for all others: no sentence, but no pair either


def test_what_is_registered_later_appears(capsys):
    class OwnDetector(META_ARCH_REGISTRY.get("GFL")):
        pass

    for registry, registered in ((DISTILL_METHOD_REGISTRY, OwnMethod), (META_ARCH_REGISTRY, OwnDetector)):
        registry.register(registered)
    try:
        cfg = get_distill_cfg()
        cfg.merge_from_list([item for key in NO_ASSISTANTS for item in (f"MODEL.DISTILL.TF_HEAD.{key}_WEIGHT", 0.0)])
        print_choices(cfg)
    finally:
        del DISTILL_METHOD_REGISTRY._obj_map["OwnMethod"], META_ARCH_REGISTRY._obj_map["OwnDetector"]
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in list_methods())
    assert "OwnMethod A method of the user's own. Needs a teacher." in text and "for GFL alone" not in text
    assert "OwnDetector one-stage, anchors, distributions" in text
    assert ":func:" not in text and "``" not in text
    assert "student GFL teacher ATSS" in text.replace("no teacher: TFHEAD ", "")  # it has lines of its own


def test_the_pair_of_a_config(tmp_path, capsys):
    """The teacher's weights are not read."""
    saved = save_teacher(tmp_path, "GeneralizedRCNN")
    (tmp_path / "teacher.pth").unlink()
    cfg = distiller_cfg("RetinaNet", saved, ["CrossKD"], DISTILL__CROSSKD__CLS_TAP=5, **R_CNN_ASSISTANT)
    cfg.MODEL.DISTILL.PKD.SCHEDULE = [["Warmup", -1]]
    print_pair(cfg, "A pair")
    text = " ".join(capsys.readouterr().out.split())
    assert "Student RetinaNet: one-stage, anchors; strides 8, 16, 32; 32 channels; 3 classes" in text
    assert "Teacher GeneralizedRCNN: two-stage, StandardROIHeads" in text
    serving, refused = text.split("Methods that cannot serve it:")
    refused, others = refused.split("Methods that need other values")
    assert "HEAD Hetero" in serving and "CrossKD" not in serving and "PKD" not in serving
    assert "CrossKD CrossKD cannot use the teacher GeneralizedRCNN" in refused
    assert "PKD MODEL.DISTILL.PKD.SCHEDULE[0] is" in others and "CrossKD" not in others


def test_a_subclass_that_overrides_forward_needs_an_adapter_of_its_own():
    gfl = META_ARCH_REGISTRY.get("GFL")
    same = type("Same", (gfl,), {})
    other = type("Other", (gfl,), {"forward": lambda self, batched_inputs: {}})
    assert adapter_of(same) is adapter_of(gfl) is not None and adapter_of(other) is None
