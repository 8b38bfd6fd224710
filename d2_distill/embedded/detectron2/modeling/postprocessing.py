"""detector_postprocess, which takes detections from the network's image size to the caller's."""

from __future__ import annotations

from detectron2.structures import Instances


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """Scale and clip ``pred_boxes``, in place, to the size wanted, and drop those that became empty."""
    height, width = results.image_size
    output = Instances((output_height, output_width), **results.get_fields())
    output.pred_boxes.scale(output_width / width, output_height / height)
    output.pred_boxes.clip(output.image_size)
    return output[output.pred_boxes.nonempty()]
