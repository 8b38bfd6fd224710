"""Checks of the recordings about data sets, transforms, mapping and sampling."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog, samplers
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image

from ..cases import Case, hash_u
from ..recording import plain
from .d2_left_out import is_left_out


def check_resize_shapes(case: Case) -> None:
    columns = list(case.data["columns"])
    for row in case.data["rows"]:
        given = dict(zip(columns, row))
        shape = T.ResizeShortestEdge.get_output_shape(given["h"], given["w"], given["short"], given["max"])
        assert shape == (given["newh"], given["neww"]), given


def image_of(text: str) -> np.ndarray:
    """The image (H, W, 3) that a case's text describes, such as 'uint8 floor(hash_u("img8")*256) shape 12x17x3'."""
    tag, *shape = re.fullmatch(
        r'uint8 (?:RGB )?floor\(hash_u\("(\w+)"\)\*256\) (?:shape )?(\d+)x(\d+)x(\d+)(?: saved as PNG)?', text
    ).groups()
    shape = [int(side) for side in shape]
    return np.floor(hash_u(tag, math.prod(shape)) * 256).astype(np.uint8).reshape(shape)


def _augmentation(name: str) -> T.Augmentation:
    """What made the random sequence of this name.

    The sizes of crops are not recorded; these are the only ones that give the recorded numbers.
    """
    flip = re.fullmatch(r"flip_([hv])(?:_p([\d.]+))?", name)
    if flip:
        return T.RandomFlip(float(flip[2] or 0.5), horizontal=flip[1] == "h", vertical=flip[1] == "v")
    return {
        "rse_choice": lambda: T.ResizeShortestEdge((8, 10, 14, 20), 28, "choice"),
        "rse_range": lambda: T.ResizeShortestEdge((8, 20), 28, "range"),
        "crop_relative_range": lambda: T.RandomCrop("relative_range", (0.5, 0.6)),
        "crop_absolute": lambda: T.RandomCrop("absolute", (7, 9)),
        "crop_absolute_range": lambda: T.RandomCrop("absolute_range", (4, 9)),
        "crop_relative": lambda: T.RandomCrop("relative", (0.5, 0.7)),
    }[name]()


def check_transforms(case: Case) -> None:
    data, image = case.data, image_of(case.data["image"])
    _check_resizing(case, image)
    _check_flips(case, image)
    start, _, names = data["attribute_order_in_sequences"].partition(" then those of ")
    assert start == "class name" and names.endswith(" that exist")
    names = names[: -len(" that exist")].split(",")
    for kind, sequence in data["random_sequences"].items():
        augmentation = _augmentation(kind)
        np.random.seed(data["numpy_seed"])
        for described in sequence:
            tfm = augmentation.get_transform(image)
            attributes = [getattr(tfm, name) for name in names if hasattr(tfm, name)]
            assert [type(tfm).__name__, *attributes] == described, kind
    _check_default_augmentations(case, image)


BOXES = np.array([[1.5, 2.0, 10.0, 11.0], [0.0, 0.0, 17.0, 12.0]])


def _check_resizing(case: Case, image: np.ndarray) -> None:
    expected = case.data["results"]
    for key in expected:
        found = re.fullmatch(r"(uint8|float|seg|box)_(\d+)x(\d+)", key)
        if not found:
            continue
        height, width = int(found[2]), int(found[3])
        tfm = T.ResizeTransform(*image.shape[:2], height, width)
        if found[1] == "uint8":
            resized = tfm.apply_image(image)
            assert resized.dtype == np.uint8 and resized.shape == (height, width, 3)
            assert resized.ravel().tolist() == expected[key]
        elif found[1] == "box":
            np.testing.assert_allclose(tfm.apply_box(BOXES), plain(expected[key]), rtol=1e-6)
        elif found[1] == "float":
            if not is_left_out(case, "images of floats", "results", key):
                resized = tfm.apply_image(image.astype(np.float32))
                np.testing.assert_allclose(resized.ravel(), plain(expected[key]), rtol=1e-6)
        elif not is_left_out(case, "segmentations", "results", key):
            assert tfm.apply_segmentation(image[:, :, 0]).ravel().tolist() == expected[key]


def _check_flips(case: Case, image: np.ndarray) -> None:
    expected, (height, width) = case.data["results"], image.shape[:2]
    hflip, vflip = T.HFlipTransform(width), T.VFlipTransform(height)
    np.testing.assert_allclose(hflip.apply_box(BOXES[:1]), plain(expected["hflip_box"]))
    np.testing.assert_allclose(vflip.apply_box(BOXES[:1]), plain(expected["vflip_box"]))
    assert hflip.apply_image(image)[0].tolist() == expected["hflip_row0"]
    coords = np.array([[0.0, 0.0], [width, height]])
    np.testing.assert_allclose(hflip.apply_coords(coords), plain(expected["hflip_coords"]))


def _check_default_augmentations(case: Case, image: np.ndarray) -> None:
    expected, cfg = case.data["results"], get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8, 10, 14), 25
    augmentations = T.AugmentationList(utils.build_augmentation(cfg, True))
    np.random.seed(case.data["numpy_seed"])
    for call in expected["default_train_list_seeded"]:
        aug_input = T.AugInput(image.copy())
        tfms = augmentations(aug_input)
        assert [type(tfm).__name__ for tfm in tfms.transforms] == call["types"]
        assert list(aug_input.image.shape) == call["shape"]
        assert int(aug_input.image.sum()) == call["sum"]
        boxes = tfms.apply_box(np.array([[1.0, 2.0, 10.0, 11.0]]))
        np.testing.assert_allclose(boxes, plain(call["box"]), rtol=1e-6)
    for is_train, key in ((True, "default_train_repr"), (False, "default_test_repr")):
        if not is_left_out(case, "repr of augmentations", "results", key):
            assert repr(T.AugmentationList(utils.build_augmentation(cfg, is_train))) == expected[key]


def check_dataset_mapper(case: Case) -> None:
    data = case.data
    Image.fromarray(image_of(data["image"])).save(case.scratch / data["record"]["file_name"])
    recorded = plain(data["record"])
    record = dict(plain(data["record"]), file_name=str(case.scratch / recorded["file_name"]))
    cfg = get_cfg()
    for key, value in plain(data["config"]).items():
        cfg.INPUT[key] = tuple(value) if isinstance(value, list) else value

    mapper = DatasetMapper(cfg, True)
    np.random.seed(data["numpy_seed"])
    for call in data["train_calls"]:
        mapped = mapper(record)
        assert sorted(mapped) == call["keys"]
        assert list(mapped["image"].shape) == call["image_shape"]
        assert str(mapped["image"].dtype) == call["image_dtype"]
        assert int(mapped["image"].sum()) == call["image_sum"]
        assert mapped["image"][:, 0, :4].tolist() == call["first_pixels_bgr"]
        instances = mapped["instances"]
        assert list(instances.image_size) == call["image_size"]
        assert instances.gt_boxes.tensor.dtype == torch.float32
        np.testing.assert_allclose(instances.gt_boxes.tensor.numpy(), plain(call["gt_boxes"]), rtol=1e-6)
        assert instances.gt_classes.tolist() == call["gt_classes"]
    assert record["annotations"] == recorded["annotations"]

    mapped, call = DatasetMapper(cfg, False)(record), data["test_call"]
    assert sorted(mapped) == call["keys"]
    assert list(mapped["image"].shape) == call["image_shape"]
    assert int(mapped["image"].sum()) == call["image_sum"]
    assert (mapped["height"], mapped["width"]) == (call["height"], call["width"])
    assert mapped["image_id"] == recorded["image_id"]


@contextlib.contextmanager
def _as_rank(rank, world_size):
    """Samplers ask these two functions only, once, when they are made."""
    with mock.patch.object(comm, "get_rank", return_value=rank):
        with mock.patch.object(comm, "get_world_size", return_value=world_size):
            yield


# The recording does not say which factors it used; these reproduce it (so would 1.3 for 1.5 and the like).
_REPEAT_FACTORS = (1.0, 1.5, 2.0, 3.2, 1.0)
# Categories of seven images: 0 is in six of them, 1 in two, 2 in one; the last has no annotation.
_CATEGORIES = ((0,), (0, 1), (0,), (0, 2), (1, 0), (0,), ())


def check_samplers(case: Case) -> None:
    """The keys of the results tell the arguments."""
    case.skip("torch")  # the version that recorded
    for key in case.data["results"]:
        check, match = next(
            (check, match) for pattern, check in _SAMPLERS.items() if (match := re.fullmatch(pattern, key))
        )
        check(case, key, *match.groups())


def _check_training(case: Case, key: str, size: str, seed: str, rank: str, world_size: str) -> None:
    with _as_rank(int(rank), int(world_size)):
        sampler = TrainingSampler(int(size), seed=int(seed))
    _assert_drawn(case, key, sampler)


def _check_unshuffled(case: Case, key: str, size: str, seed: str) -> None:
    if not is_left_out(case, "TrainingSampler(shuffle=False)", "results", key):
        _assert_drawn(case, key, TrainingSampler(int(size), shuffle=False, seed=int(seed)))


def _check_subset(case: Case, key: str, size: str, ratio: str, seed: str) -> None:
    if not is_left_out(case, "RandomSubsetTrainingSampler", "results", key):
        subset = samplers.RandomSubsetTrainingSampler
        # The subset itself was drawn from the next seed.
        _assert_drawn(case, key, subset(int(size), float(ratio), seed_shuffle=int(seed), seed_subset=int(seed) + 1))


def _check_repeat_factor(case: Case, key: str, seed: str) -> None:
    _assert_drawn(case, key, RepeatFactorTrainingSampler(torch.tensor(_REPEAT_FACTORS), seed=int(seed)))


def _assert_drawn(case: Case, key: str, sampler) -> None:
    recorded = case.data["results"][key]
    assert list(itertools.islice(iter(sampler), len(recorded))) == recorded, key


def _check_repeat_factors(case: Case, key: str, threshold: str, without_root: str | None) -> None:
    dicts = [{"annotations": [{"category_id": c} for c in categories]} for categories in _CATEGORIES]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, float(threshold), sqrt=not without_root
    )
    assert factors.tolist() == pytest.approx(list(case.data["results"][key]), rel=1e-6)


def _check_inference(case: Case, key: str, size: str, world_size: str) -> None:
    shards = []
    for rank in range(int(world_size)):
        with _as_rank(rank, int(world_size)):
            sampler = InferenceSampler(int(size))
        assert len(sampler) == len(list(sampler))
        shards.append(list(sampler))
    assert shards == case.data["results"][key]


def _check_aspect_groups(case: Case, key: str, seed: str) -> None:
    """The seed is that of the sizes, which are recorded."""
    recorded = case.data["results"][key]
    records = [{"width": w, "height": h, "id": i} for i, (w, h) in enumerate(recorded["wh"])]
    (name,) = (name for name in recorded if name.startswith("batches_of_"))
    groups = AspectRatioGroupedDataset(records, int(name.rpartition("_")[2]))
    assert [[record["id"] for record in batch] for batch in groups] == recorded[name]


_SAMPLERS = {
    r"training_n(\d+)_seed(\d+)_rank(\d+)of(\d+)": _check_training,
    r"training_noshuffle_n(\d+)_seed(\d+)": _check_unshuffled,
    r"subset_n(\d+)_ratio([\d.]+)_seed(\d+)": _check_subset,
    r"repeat_factor_seed(\d+)": _check_repeat_factor,
    r"repeat_factors_thr([\d.]+)(_nosqrt)?": _check_repeat_factors,
    r"inference_n(\d+)_world(\d+)": _check_inference,
    r"aspect_group_seed(\d+)": _check_aspect_groups,
}


def check_builtin_datasets(case: Case) -> None:
    data = case.data
    variable, default = re.fullmatch(
        r'environment variable (\w+), default "(\w+)" \(paths below contain the default\)', data["root"]
    ).groups()
    root = os.path.expanduser(os.getenv(variable, default))
    for dataset, facts in data["datasets"].items():
        metadata = MetadataCatalog.get(dataset)
        for key, value in facts.items():
            if key in ("json_file", "image_root", "dirname"):
                value = os.path.join(root, os.path.relpath(value, default))
            assert getattr(metadata, key) == value, (dataset, key)
        if dataset.startswith("coco"):
            assert metadata.thing_classes == data["coco_thing_classes"]
            id_map = {str(k): v for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
            assert id_map == data["coco_id_map"]
            if not is_left_out(case, "thing_colors", "coco_thing_colors_first3"):
                assert [list(color) for color in metadata.thing_colors[:3]] == data["coco_thing_colors_first3"]
        else:
            assert list(metadata.thing_classes) == data["voc_thing_classes"]


CHECKS = {
    "resize_shapes": check_resize_shapes,
    "transforms": check_transforms,
    "dataset_mapper": check_dataset_mapper,
    "samplers": check_samplers,
    "builtin_datasets": check_builtin_datasets,
}
