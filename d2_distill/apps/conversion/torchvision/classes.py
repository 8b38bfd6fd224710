"""Which class outputs of a torchvision detector are classes, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ....errors import UserError

# Of the published detectors, whose outputs are COCO's 90 category numbers, with gaps, behind the background.
COCO_OUTPUTS = 91
_NO_CLASS = ("__background__", "N/A")


@dataclass(frozen=True)
class Classes:
    """
    Attributes:
        outputs: index of each class among torchvision's outputs.
        names: of the classes; empty if they are not known.
        published: whether they are those of the published detectors.
    """

    outputs: list[int]
    names: list[str]
    published: bool = False

    def select(self, tensor: torch.Tensor, num_outputs: int, blocks: int = 1) -> torch.Tensor:
        """The rows of the classes.

        Args:
            tensor: its first dimension is ``blocks`` times ``num_outputs`` times any number of rows.
        """
        rows = tensor.unflatten(0, (blocks, num_outputs, -1))
        return rows[:, self.outputs].flatten(0, 2)


def kept_classes(num_outputs: int, names: Sequence[str], *, source: str, softmax: bool) -> Classes:
    """
    Args:
        num_outputs: of the detector.
        names: of its classes, if they are known to the user.
        source: what error messages call the checkpoint.
        softmax: whether output 0 must be the background (Faster R-CNN). In RetinaNet and FCOS it is one that no
            ground truth has, if labels begin with 1 as torchvision asks for.

    Raises:
        UserError: another number of names is needed, or a name comes twice, or there is no class.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--classes has {twice!r} twice; name each class once, in the order of the labels.")
    if not names and num_outputs == COCO_OUTPUTS:
        published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        outputs = [index for index, name in enumerate(published) if name not in _NO_CLASS]
        return Classes(outputs, [published[index] for index in outputs], published=True)
    if names and len(names) == num_outputs and not softmax:
        return Classes(list(range(num_outputs)), list(names))
    if names and len(names) != num_outputs - 1:
        or_all = "" if softmax else f", or {num_outputs} if its labels began with 0"
        raise UserError(
            f"--classes has {len(names)} names, but {source} has {num_outputs} class outputs, of which the first is "
            f"the background; give {num_outputs - 1} names{or_all}."
        )
    if num_outputs < 2:
        raise UserError(
            f"{source} has {num_outputs} class output, which in torchvision is the background; if it is a class "
            "(labels began with 0), name it by --classes."
        )
    return Classes(list(range(1, num_outputs)), list(names))
