"""Padded boxes in chunks, so that tensors of all pairs of boxes and anchors stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

# Largest batch, in images x boxes x anchors, that is computed at once. Each takes up to 20 bytes, in total 320 MiB.
MAX_PAIRS = 2**24
# Size of a chunk of larger batches. The CPU is 2 to 4 times faster with tensors of up to 32 MiB, whose memory glibc
# reuses instead of returning it to the system.
CHUNK_PAIRS = 2**22

Result = TypeVar("Result", torch.Tensor, tuple)


def box_chunks(valid_boxes: torch.Tensor, num_anchors: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the images and of their boxes that are compared with all the anchors at once.

    A batch of at most :data:`MAX_PAIRS` is one chunk, and nothing is read to the host. Otherwise the chunks have at
    most :data:`CHUNK_PAIRS`, or one box: they take some images with all boxes, or some boxes of one image, in order.
    Padding after the last box of the images is left out, except for one box if there is no other.

    Args:
        valid_boxes: (N, G) bool.
        num_anchors: number of anchors that each box is compared with.
    """
    num_images, num_boxes = valid_boxes.shape
    if num_images * num_boxes * num_anchors <= MAX_PAIRS:
        yield slice(0, num_images), slice(0, num_boxes)
        return
    numbers = torch.arange(1, num_boxes + 1, device=valid_boxes.device)
    counts = (valid_boxes * numbers).amax(dim=1).clamp(min=1).tolist()
    boxes_at_once = max(CHUNK_PAIRS // num_anchors, 1)
    image = 0
    while image < num_images:
        end = image + 1
        while end < num_images and (end + 1 - image) * max(counts[image : end + 1]) <= boxes_at_once:
            end += 1
        most = max(counts[image:end])
        for start in range(0, most, boxes_at_once):
            yield slice(image, end), slice(start, min(start + boxes_at_once, most))
        image = end


def reduce_over_boxes(
    compute: Callable[[slice, slice], Result],
    combine: Callable[[Result, Result], Result],
    valid_boxes: torch.Tensor,
    num_anchors: int,
) -> Result:
    """Return what ``compute`` finds over all boxes, from what it finds over each of :func:`box_chunks`.

    Args:
        compute: gives a tensor or a tuple of tensors, images first, of a slice of the images and one of their boxes.
        combine: gives the result of an image's boxes from that of some and that of those after them.
        valid_boxes, num_anchors: as in :func:`box_chunks`.
    """
    results = []
    for images, boxes in box_chunks(valid_boxes, num_anchors):
        result = compute(images, boxes)
        if boxes.start == 0:
            results.append(result)
        else:
            results[-1] = combine(results[-1], result)
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(of_images) for of_images in zip(*results))
    return torch.cat(results)
