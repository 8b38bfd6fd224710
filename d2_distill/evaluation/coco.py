"""COCO's average precision on the annotations that were checked before the run."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO

from ..data.loaded import load_once


COCO_DETECTIONS = 100  # of an image, that COCO's evaluation counts
UNLIMITED = 10**6


class CheckedCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator``, but it reads no file again whose ground truth is kept since its check.

    Processes other than the main one only collect detections, so they get no ground truth at all.

    COCO counts 100 detections of an image and leaves out the others; here a detector that may return more is judged by all.

    Args:
        dataset_name: registered with an annotation file of COCO's format.
        output_dir: see ``COCOEvaluator``.
        max_detections: the most detections that the detector returns of an image; negative if they are not limited.
    """

    def __init__(
        self, dataset_name: str, *, output_dir: str | None = None, max_detections: int = COCO_DETECTIONS
    ) -> None:
        truth = load_once(dataset_name).truth
        limit = max(max_detections, COCO_DETECTIONS) if max_detections >= 0 else UNLIMITED
        # Detectron2 evaluates by faster code where it is not given a limit.
        arguments = {"output_dir": output_dir, **({"max_dets_per_image": limit} if limit != COCO_DETECTIONS else {})}
        if truth is None and comm.is_main_process():
            super().__init__(dataset_name, **arguments)
        else:
            with _read_instead_of_file(_coco(truth)):
                super().__init__(dataset_name, **arguments)


def _coco(truth: bytes | None) -> COCO:
    coco = COCO()
    if truth is not None:
        coco.dataset = pickle.loads(truth)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    return coco


@contextlib.contextmanager
def _read_instead_of_file(coco: COCO) -> Iterator[None]:
    """Context manager: Detectron2's evaluator, which takes nothing but the path of a file, gets ``coco`` of any."""
    original = coco_evaluation.COCO
    coco_evaluation.COCO = lambda path: coco
    try:
        yield
    finally:
        coco_evaluation.COCO = original
