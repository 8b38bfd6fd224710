"""The config key of the number of classes, for every detector."""

from __future__ import annotations

import pytest

from d2_distill.detectors.building import num_classes_key
from d2_distill.staged import stage_detector

from ..small_detectors import CASES, build, detector_cfg, distiller_cfg


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_num_classes_key(case):
    cfg = detector_cfg(case)
    key = num_classes_key(cfg)
    assert key == num_classes_key(distiller_cfg(case, None))
    cfg.merge_from_list([key, 5])
    assert stage_detector(build(cfg)).num_classes == 5
