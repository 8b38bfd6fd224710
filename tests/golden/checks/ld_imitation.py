"""Feature imitation of the published localisation distillation code, a part of its training losses."""

from __future__ import annotations

import torch

from d2_distill.config.keys import get_distill_cfg
from d2_distill.methods import build_methods
from d2_distill.methods.imitation_regions import REGIONS
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_recorded
from ..ld_runs import RecordedRuns

# Published name -> ours.
_REGIONS = {"finegrained": "finegrained", "fitnet": "inside_gt", "gibox": "gibox"}


def imitation_terms(case: Case, runs: RecordedRuns) -> dict[str, torch.Tensor]:
    """The weighted term; nothing if the case has none."""
    params = case.data["params"]
    if not params.get("im_weight"):
        return {}
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.METHODS = ("FeatureImitation",)
    node = cfg.MODEL.DISTILL.IMITATION
    node.WEIGHT, node.REGION = params["im_weight"], _REGIONS[params["im_mode"]]
    node.ADAPTER = node.GI_PER_IMAGE = False
    teacher = Teacher(runs.teacher.staged.model, input_format=cfg.INPUT.FORMAT)
    method = build_methods(cfg, runs.student.staged, teacher)["FeatureImitation"]
    terms = method(runs.student, runs.teacher)
    return {name: value * method.weight_at(name, 0) for name, value in terms.items()}


def assert_region(case: Case, runs: RecordedRuns) -> None:
    """The cells that are imitated, where they were recorded."""
    if "out_tgt_im_region" in case.arrays:
        # Where the published code selects general instances it records the inside of the boxes.
        region = _REGIONS[case.data["params"]["im_mode"]].replace("gibox", "inside_gt")
        assert_recorded(case, "out_tgt_im_region", REGIONS[region](runs.student, runs.teacher))
