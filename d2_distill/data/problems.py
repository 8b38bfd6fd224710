"""What can be wrong with a data set: kinds of problems, and two ways to take one: raise the first, or keep all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from ..errors import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        title: of all problems of the kind, e.g. "boxes without area".
        remedy: what to do about it.
        is_error: training or evaluation would stop at it; else it only deserves a look.
    """

    title: str
    remedy: str
    is_error: bool = True


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        kind: its kind.
        sentence: which file, image or annotation has what fault; without the remedy and without a full stop.
    """

    kind: Kind
    sentence: str


Found = Callable[[Problem], None]  # takes each problem as it is found


def refusing(source: str) -> Found:
    """Raises UserError at the first error.

    Args:
        source: who names the data, e.g. ``"DATASETS.COCO (data set 'mine')"``; the sentence begins with it.
    """

    def found(problem: Problem) -> None:
        if problem.kind.is_error:
            raise UserError(f"{source}: {problem.sentence}; {problem.kind.remedy}.")

    return found


_PATH = "correct its path, which is relative to $DETECTRON2_DATASETS (default: datasets), or put it there"

MISSING_FILE = Kind("annotation files that cannot be read", _PATH)
MISSING_FOLDER = Kind("folders that are missing", _PATH)
MISSING_SPLIT = Kind("split files that are missing", "write it, one image id a line")
MALFORMED_SPLIT = Kind("malformed lines of a split", "write one image id a line, without suffix")
NOT_JSON = Kind("files that are no JSON", "restore or re-export it")
NOT_COCO = Kind("files in another format", "convert it or name another file")
MISSING_XML = Kind("annotation files that are missing", "restore it, or remove its name from the split")
NOT_XML = Kind("annotation files that are no XML", "restore it")
MALFORMED_ENTRY = Kind("malformed entries", "correct it or re-export the file")
REPEATED_ID = Kind("ids that are used twice", "make the ids unique")
REPEATED_CLASS = Kind("classes of the same name", "make the names in 'categories' unique")
UNKNOWN_CATEGORY = Kind("annotations of unknown categories", "add the category or remove the annotation")
UNKNOWN_CLASS = Kind("objects of unknown classes", "add it there or correct the file")
UNKNOWN_IMAGE = Kind("annotations of unknown images", "add the image or remove the annotation")
IGNORED = Kind("annotations with 'ignore' set", "use 'iscrowd' or remove it")
NOT_EVALUABLE = Kind(
    "annotations that cannot be evaluated on", "add it: width times height of the box as 'area', and 0 as 'iscrowd'"
)
MALFORMED_RECORD = Kind("malformed records", "correct the function that loads the data set")
NO_LOADING = Kind("data sets that cannot be loaded", "correct its files")
EMPTY = Kind("empty data sets", "correct its annotation file or split, or name another data set")
NOTHING_TO_LEARN = Kind("training sets without a usable box", "annotate some")
MISSING_IMAGE = Kind("image files that are missing", "correct the image folder or restore the files")
NOT_FINITE = Kind("boxes that are not finite", "correct it")
NO_AREA = Kind("boxes without area", "correct or remove it")
OUTSIDE = Kind("boxes outside of their image", "correct or remove it")
CORNERS = Kind(
    "boxes given by two corners where width and height belong",
    "convert all boxes to x, y, width, height (subtract the first corner from the second)",
)
RELATIVE = Kind(
    "boxes in parts of the image's size where pixels belong",
    "multiply x and width by the image's width, y and height by its height",
)
BAD_IMAGE = Kind("image files that cannot be used", "restore the file or correct the size that the annotation tells")
OTHER_CLASSES = Kind(
    "class lists that differ",
    "give both the same names in the same order, which in COCO files is that of the category ids",
)

STICKS_OUT = Kind(
    "boxes that stick out of their image",
    "they are clipped; look whether the image size is right, and whether these boxes are x, y, width, height and no corners",
    False,
)
NO_POLYGON = Kind(
    "annotations whose polygons have less than three points",
    "they are left out, as Detectron2 does: correct the polygon, or remove it and keep the box",
    False,
)
TINY = Kind(
    "boxes that become tiny",
    "raise INPUT.MIN_SIZE_TRAIN, crop the images, or leave them out",
    False,
)
LABELLED_TWICE = Kind("objects that are annotated twice", "remove one of the two", False)
NO_OBJECTS = Kind(
    "images without an object",
    "look whether objects were forgotten; training leaves them out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False",
    False,
)
UNUSED_CLASS = Kind("classes without a box", "annotate some, or remove the class from the class list", False)
NOT_TRAINED = Kind("classes that only the test data have", "annotate some in the training data", False)
SIMILAR_NAMES = Kind("class names that differ only in case or blanks", "look whether they are one class", False)
REPEATED_FILE = Kind("image files that are listed twice", "list each once, with all its annotations", False)
SAME_IMAGE = Kind("image files of the same content", "keep one of them", False)
SAME_LOOK = Kind("images that look alike", "look whether they are the same picture, and keep one of them", False)
SHARED_IMAGE = Kind("images that are in the training and in the test data", "remove them from one of the two", False)
SHARED_LOOK = Kind("images that look alike in the training and in the test data", "remove them from one of the two", False)
DEEP_COLOUR = Kind(
    "images of more than 8 bits",
    "they are scaled to 8 bits by the range of their type, so those that use little of it come out dark: look at them with "
    "--draw",
    False,
)
THIN = Kind(
    "images of which training sees a strip of a few pixels",
    "their shorter side shrinks with the longer one, which INPUT.MAX_SIZE_TRAIN limits: cut them into pieces, or leave them out",
    False,
)
