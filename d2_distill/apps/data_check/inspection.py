"""Finds every problem of the data sets of a config, and what they consist of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ...boxes.overlaps import pairwise_overlaps
from ...data import problems
from ...data.checks import check_content, compare_classes, require_registered
from ...data.coco_files import read_coco
from ...data.mapper import ImageFileError, check_image_file, size_sentence
from ...data.pictures import SIDEWAYS, is_deep, orientation, read_image
from ...data.problems import Kind, Problem
from ...data.records import boxes_xyxy, check_records, is_crowd, place_of
from ...data.registration import CocoFiles, VocFiles, declared_files
from ...data.subset import evenly_spread
from ...data.voc_files import read_voc, voc_class_names
from ...errors import UserError

TINY_SIDE = 8.0  # pixels: a cell of the finest map that most one-stage detectors read
THIN_SIDE = 16.0  # pixels: a single row of cells or two
SAME_OBJECT_IOU = 0.95
_HASH_SIDE = 8
TRAIN, TEST = "DATASETS.TRAIN", "DATASETS.TEST"


@dataclass
class Inspection:
    """A data set, and what is wrong with it.

    Attributes:
        name: its name.
        keys: the config keys that name it, ``"DATASETS.TRAIN"`` and ``"DATASETS.TEST"``.
        source: files that it is read from, in words.
        prefixes: beginnings of the paths in the problems' sentences that go without saying after ``source``.
        records: in Detectron2's standard form, with the annotations that can be used.
        class_names: in the order of the categories.
        problems: in the order in which they were found.
    """

    name: str
    keys: list[str]
    source: str = ""
    prefixes: Sequence[str] = ()
    records: list[dict] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def tell(self, kind: Kind, sentence: str) -> None:
        self.problems.append(Problem(kind, sentence))

    @property
    def annotations(self) -> list[dict]:
        """All that are no crowds."""
        return [row for record in self.records for row in record["annotations"] if not is_crowd(row)]

    def boxes_of_classes(self) -> list[int]:
        """Number of boxes of each class."""
        counts = Counter(row["category_id"] for row in self.annotations)
        return [counts[index] for index in range(len(self.class_names))]


def inspect_annotations(cfg) -> list[Inspection]:
    """Read every data set of ``DATASETS.TRAIN`` and ``DATASETS.TEST``; no image file is opened.

    Raises:
        UserError: both are empty.
    """
    keys: dict[str, list[str]] = defaultdict(list)
    for key, names in ((TRAIN, cfg.DATASETS.TRAIN), (TEST, cfg.DATASETS.TEST)):
        for name in names:
            if key not in keys[name]:
                keys[name].append(key)
    if not keys:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty; name a data set in them, or by --train-data.")
    inspections, class_names = [], list(cfg.DATASETS.CLASSES)
    for name, named_by in keys.items():
        inspections.append(_inspect(cfg, name, named_by, class_names))
        class_names = class_names or inspections[-1].class_names
    _compare_class_lists(inspections, cfg.DATASETS.CLASSES)
    return inspections


def _inspect(cfg, name: str, keys: list[str], default_class_names: Sequence[str]) -> Inspection:
    inspection = Inspection(name, keys)
    try:
        records, inspection.class_names = _read(cfg, inspection, default_class_names)
    except UserError as error:
        inspection.tell(problems.NO_LOADING, str(error).rstrip("."))
        return inspection
    inspection.records = check_records(records, inspection.class_names, inspection.problems.append)
    if records or not any(problem.kind.is_error for problem in inspection.problems):
        check_content(records, inspection.records, inspection.problems.append, train=TRAIN in keys)
    annotated = {record["file_name"] for record in records if record.get("annotations")}
    for record in inspection.records:
        if record["file_name"] not in annotated:
            inspection.tell(problems.NO_OBJECTS, f"the image {record['file_name']} has no object")
    _check_labels(inspection, _training_scale(cfg))
    return inspection


def _read(cfg, inspection: Inspection, default_class_names: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Records and class names; what cannot be read is told.

    Args:
        default_class_names: of a Pascal VOC row that names none, see :func:`.registration.register_datasets`.

    Raises:
        UserError: the data set is not known, or Python code that loads it fails.
    """
    name, found = inspection.name, inspection.problems.append
    files = declared_files(cfg, name)
    if files is None:
        require_registered(name, " and ".join(inspection.keys))
        files = _registered_files(name)
    if isinstance(files, CocoFiles):
        inspection.source = f"{files.json_file}, images in {files.image_root}"
        inspection.prefixes = (f"{files.json_file}: ", os.path.join(files.image_root, ""))
        content = read_coco(files.json_file, files.image_root, found, evaluated=TEST in inspection.keys, with_masks=cfg.MODEL.MASK_ON)
        return content.records, content.class_names
    if isinstance(files, VocFiles):
        inspection.source = f"{files.dirname}, split {files.split}"
        inspection.prefixes = (os.path.join(files.dirname, ""),)
        class_names = list(files.class_names or default_class_names)
        with contextlib.suppress(UserError):  # a folder that is missing is told below
            class_names = class_names or voc_class_names(files.dirname, source=name)
        return read_voc(files.dirname, files.split, class_names, found), class_names
    inspection.source = "registered from Python"
    try:
        records = DatasetCatalog.get(name)
    except Exception as error:
        raise UserError(f"it cannot be loaded ({type(error).__name__}: {error})") from error
    return records, list(MetadataCatalog.get(name).get("thing_classes", None) or [])


def _registered_files(name: str) -> CocoFiles | VocFiles | None:
    """Files of a data set that Detectron2 or the user's code has registered; None if it is of another kind."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") and metadata.get("evaluator_type") == "coco":
        return CocoFiles(name, metadata.json_file, metadata.image_root)
    if metadata.get("dirname") and metadata.get("split"):
        return VocFiles(name, metadata.dirname, metadata.split, metadata.thing_classes, metadata.year)
    return None


def _training_scale(cfg) -> Callable[[dict], float]:
    """The factor by which training scales the image of a record, where it makes it smallest."""
    shortest, longest = min(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN

    def scale(record: dict) -> float:
        sides = sorted((record["width"], record["height"]))
        return min(shortest / sides[0], longest / sides[1]) if shortest else 1.0

    return scale


def _check_labels(inspection: Inspection, scale: Callable[[dict], float]) -> None:
    """What is no error, but deserves a look."""
    tell = inspection.tell
    for record in inspection.records:
        side = min(record["width"], record["height"]) * scale(record)
        if side < THIN_SIDE:
            size = f"{record['width']} x {record['height']}"
            fault = f"the shorter side of the image {record['file_name']} of {size} is {side:.1f} pixels in training"
            tell(problems.THIN, fault)
        if not record["annotations"]:
            continue
        boxes = boxes_xyxy(record["annotations"])
        crowd = np.array([is_crowd(row) for row in record["annotations"]])
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) * scale(record)
        for index in np.flatnonzero((sides < TINY_SIDE) & ~crowd):
            tell(
                problems.TINY,
                f"{place_of(record, index)}: the longer side of the box {record['annotations'][index]['bbox']} is "
                f"{sides[index]:.1f} pixels in training",
            )
        for first, second in _same_objects(boxes, record["annotations"]):
            tell(problems.LABELLED_TWICE, f"{place_of(record, first)} is also annotation "
                 f"{record['annotations'][second].get('id', second)}")
    for path, count in Counter(record["file_name"] for record in inspection.records).items():
        if count > 1:
            tell(problems.REPEATED_FILE, f"{path} is listed {count} times")
    if inspection.records:
        for name, count in zip(inspection.class_names, inspection.boxes_of_classes()):
            if not count:
                tell(problems.UNUSED_CLASS, f"there is no box of {name!r}")
    similar = defaultdict(list)
    for name in inspection.class_names:
        similar["".join(str(name).lower().split())].append(name)
    for names in similar.values():
        if len(names) > 1:
            tell(problems.SIMILAR_NAMES, " and ".join(map(repr, names)))


def _same_objects(boxes: np.ndarray, annotations: Sequence[dict]) -> Iterator[tuple[int, int]]:
    if len(boxes) < 2:
        return
    classes = np.array([row["category_id"] for row in annotations])
    overlaps = pairwise_overlaps(*[torch.from_numpy(boxes)] * 2).numpy()
    same = (overlaps > SAME_OBJECT_IOU) & (classes[:, None] == classes)
    for first, second in zip(*np.nonzero(np.triu(same, 1))):
        yield int(first), int(second)


def _compare_class_lists(inspections: Sequence[Inspection], expected: Sequence[str]) -> None:
    seen: dict[str, list[str]] = {}
    known = [inspection for inspection in inspections if inspection.class_names]
    for inspection in known:
        found = inspection.problems.append
        compare_classes(inspection.name, inspection.class_names, dict([*seen.items()][:1]), expected, found)
        seen[inspection.name] = inspection.class_names
    trained = {
        name
        for inspection in known if TRAIN in inspection.keys
        for name, count in zip(inspection.class_names, inspection.boxes_of_classes()) if count
    }
    if not any(TRAIN in inspection.keys and inspection.records for inspection in known):
        return
    for inspection in known:
        for name, count in zip(inspection.class_names, inspection.boxes_of_classes()):
            if count and name not in trained:
                fault = f"{inspection.name} has {count} boxes of {name!r}, the training data none"
                inspection.tell(problems.NOT_TRAINED, fault)


@dataclass(frozen=True)
class _Look:
    """What is known of an image file after it was read.

    Attributes:
        problem: None if it can be used.
        digest: of the file, None if no other file has its size.
        hash: difference hash of the picture; None if it was not decoded, or is all of one colour.
        deep: it has more than 8 bits.
    """

    problem: str | None = None
    digest: bytes | None = None
    hash: bytes | None = None
    deep: bool = False


def inspect_images(
    inspections: Sequence[Inspection], *, decode: bool, step: Callable[[], None]
) -> None:
    """Read every image file once, and add what is wrong with it to the inspections.

    Args:
        decode: False reads only the head of each file, by which broken ones and images that look alike are not found.
        step: called after each file.
    """
    records = {record["file_name"]: record for each in inspections for record in each.records}
    sizes = {path: os.path.getsize(path) for path in records if os.path.isfile(path)}
    shared = {size for size, count in Counter(sizes.values()).items() if count > 1}

    def look(path: str) -> tuple[str, _Look]:
        return path, _look(records[path], decode=decode, digest=sizes[path] in shared)

    looks: dict[str, _Look] = {}
    # The filters of warnings belong to the process: threads that set and restore them would leave each other's.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of huge images and odd metadata
        try:
            for path, found in pool.map(look, sizes):
                looks[path] = found
                step()
        except BaseException:  # Ctrl-C: do not wait for the files that are left
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for inspection in inspections:
        for path in dict.fromkeys(record["file_name"] for record in inspection.records):
            found = looks.get(path, _Look())
            if found.problem:
                inspection.tell(problems.BAD_IMAGE, found.problem)
            if found.deep:
                inspection.tell(problems.DEEP_COLOUR, f"the image {path} has more than 8 bits")
    _tell_equal_images(inspections, looks)


def _look(record: dict, *, decode: bool, digest: bool) -> _Look:
    path = record["file_name"]
    try:
        with Image.open(path) as image:
            deep, size = is_deep(image), _turned_size(image)
        picture = check_image_file(record) if decode else None
        content = _digest(path) if digest else None
    except ImageFileError as error:
        return _Look(problem=str(error).rpartition(";")[0])
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError ...
        return _Look(problem=f"The image {path} cannot be read ({error})")
    if picture is not None:
        return _Look(digest=content, hash=_difference_hash(picture), deep=deep)
    problem = None if size == (record["width"], record["height"]) else size_sentence(record, *size)
    return _Look(problem, digest=content, deep=deep)


def _turned_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a file of which only the head was read, turned as its metadata say."""
    return image.size[::-1] if orientation(image) in SIDEWAYS else image.size


def _digest(path: str) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            content.update(part)
    return content.digest()


def _difference_hash(image: np.ndarray) -> bytes | None:
    """64 bits, whether each cell of the image scaled to 9 x 8 is brighter than its left neighbour; None for all alike."""
    grey = Image.fromarray(image[:, :, 1]).resize((_HASH_SIDE + 1, _HASH_SIDE), Image.BOX)
    pixels = np.asarray(grey, dtype=np.int16)
    bits = np.diff(pixels, axis=1) > 0
    return np.packbits(bits).tobytes() if 4 <= bits.sum() <= bits.size - 4 else None


def _tell_equal_images(inspections: Sequence[Inspection], looks: dict[str, _Look]) -> None:
    """Tell pairs of images that are, or look, the same: within each set, and between training and test data."""
    for attribute, same, shared in (
        ("digest", problems.SAME_IMAGE, problems.SHARED_IMAGE),
        ("hash", problems.SAME_LOOK, problems.SHARED_LOOK),
    ):
        trained: dict[bytes, list[str]] = defaultdict(list)
        for inspection in inspections:
            first: dict[bytes, str] = {}
            for path in dict.fromkeys(record["file_name"] for record in inspection.records):
                value = getattr(looks.get(path, _Look()), attribute) or (path.encode() if attribute == "digest" else None)
                if value is None:
                    continue
                other = first.setdefault(value, path)
                if other != path and not _told(looks, attribute, path, other):
                    inspection.tell(same, f"{path} and {other}")
                if TRAIN in inspection.keys:
                    trained[value].append(path)
                elif path in trained[value]:
                    if attribute == "digest":
                        inspection.tell(shared, path)
                elif trained[value] and not _told(looks, attribute, path, trained[value][0]):
                    inspection.tell(shared, f"{path} and, in the training data, {trained[value][0]}")


def _told(looks: dict[str, _Look], attribute: str, path: str, other: str) -> bool:
    """Whether two images that look alike are told already, as files of the same content."""
    return attribute == "hash" and looks[path].digest is not None and looks[path].digest == looks[other].digest


def samples(inspection: Inspection, number: int) -> Iterable[tuple[dict, np.ndarray]]:
    """Records, evenly over the set, with their images (H, W, 3) RGB; those that cannot be read are left out."""
    readable = [record for record in inspection.records if os.path.isfile(record["file_name"])]
    for record in evenly_spread(readable, number):
        with contextlib.suppress(Exception):
            yield record, read_image(record["file_name"], "RGB")
