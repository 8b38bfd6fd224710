"""What is recorded of Detectron2 and the embedded subset does not have; of the real one it is compared, too."""

from __future__ import annotations

from d2_distill import provider

from ..cases import Case

LEFT_OUT = {
    "padding_constraints": "no backbone of the project has any",
    "images of floats": "the images are uint8",
    "segmentations": "there are no masks",
    "repr of augmentations": "text for the log",
    "TrainingSampler(shuffle=False)": "the project always shuffles",
    "RandomSubsetTrainingSampler": "no config of the project uses it",
    "thing_colors": "colors are optional metadata",
    "configs of version 1": "they are refused instead of upgraded",
    "model zoo": "the project ships its own base configs and does not use the zoo's table",
    "mask heads": "no masks, so no config is shipped",
}


def is_left_out(case: Case, what: str, *path: str | int) -> bool:
    """Whether the Detectron2 in use lacks ``what``; if so, the recording at ``path`` needs no reader."""
    assert what in LEFT_OUT
    if provider.name() == "real":
        return False
    case.skip(*path)
    return True
