"""Results of an evaluation: copy-and-paste lines, check against expected values, flattening."""

from __future__ import annotations

import logging
import pprint
import sys
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping) -> None:
    """Log each task's metrics as two comma-separated lines; per-class ones (with a "-") are left out."""
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info(f"copypaste: {task}={metrics}")
            continue
        shown = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info(f"copypaste: Task: {task}")
        logger.info("copypaste: " + ",".join(shown))
        logger.info("copypaste: " + ",".join(f"{value:.4f}" for value in shown.values()))


def verify_results(cfg, results: Mapping) -> bool:
    """Compare with TEST.EXPECTED_RESULTS, rows of [task, metric, expected, tolerance].

    Returns:
        True; where a row is missed by more than its tolerance the process exits with status 1.
    """
    rows = cfg.TEST.EXPECTED_RESULTS
    # not (a > b): a NaN is a failure
    if all(abs(results[task].get(metric, float("nan")) - expected) <= tolerance
           for task, metric, expected, tolerance in rows):
        return True
    logger.error(f"TEST.EXPECTED_RESULTS {rows} are not met by\n{pprint.pformat(results)}")
    sys.exit(1)


def flatten_results_dict(results: Mapping) -> dict[str, Any]:
    """{"bbox": {"AP": 1}} -> {"bbox/AP": 1}, at any depth."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": v for inner, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
