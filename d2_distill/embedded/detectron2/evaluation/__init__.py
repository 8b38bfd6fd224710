"""Evaluators (COCO and Pascal VOC box AP), the loop that feeds them, and printing and checking of results."""

from .coco_evaluation import COCOEvaluator  # noqa: F401
from .evaluator import DatasetEvaluator, inference_on_dataset  # noqa: F401
from .pascal_voc_evaluation import PascalVOCDetectionEvaluator  # noqa: F401
from .testing import print_csv_format, verify_results  # noqa: F401
