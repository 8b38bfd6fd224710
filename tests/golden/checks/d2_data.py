"""Checks of the recordings about data sets, transforms, mapping and sampling."""

from __future__ import annotations

import contextlib
import itertools
import os
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image

from ..cases import hash_u

LEFT_OUT = {
    "transforms: float_*, seg_*": "the images are uint8 and there are no masks",
    "transforms: default_*_repr": "text for the log",
    "samplers: training_noshuffle_*": "the project always shuffles",
    "samplers: subset_*": "RandomSubsetTrainingSampler is not used by any config of the project",
    "builtin_datasets: coco_thing_colors_first3": "colours are optional metadata",
}


def check_resize_shapes(data, arrays, name, tmp_path):
    for height, width, short, longest, new_height, new_width in data["rows"]:
        shape = T.ResizeShortestEdge.get_output_shape(height, width, short, longest)
        assert shape == (new_height, new_width), (height, width, short, longest)


def _transforms_image() -> np.ndarray:
    return np.floor(hash_u("img8", 12 * 17 * 3) * 256).astype(np.uint8).reshape(12, 17, 3)


# how the random sequences were made; the sizes of the crops are the only ones that give the recorded numbers
_RANDOM = {
    "flip_h": lambda: T.RandomFlip(),
    "flip_v_p0.3": lambda: T.RandomFlip(prob=0.3, horizontal=False, vertical=True),
    "rse_choice": lambda: T.ResizeShortestEdge((8, 10, 14, 20), 28, "choice"),
    "rse_range": lambda: T.ResizeShortestEdge((8, 20), 28, "range"),
    "crop_relative_range": lambda: T.RandomCrop("relative_range", (0.5, 0.6)),
    "crop_absolute": lambda: T.RandomCrop("absolute", (7, 9)),
    "crop_absolute_range": lambda: T.RandomCrop("absolute_range", (4, 9)),
    "crop_relative": lambda: T.RandomCrop("relative", (0.5, 0.7)),
}
_ATTRIBUTES = ("new_h", "new_w", "x0", "y0", "w", "h")


def check_transforms(data, arrays, name, tmp_path):
    image, expected = _transforms_image(), data["results"]
    box = np.array([[1.5, 2.0, 10.0, 11.0], [0.0, 0.0, 17.0, 12.0]])
    for height, width in ((6, 9), (20, 31)):
        tfm, suffix = T.ResizeTransform(12, 17, height, width), f"{height}x{width}"
        resized = tfm.apply_image(image)
        assert resized.dtype == np.uint8 and resized.shape == (height, width, 3)
        assert resized.ravel().tolist() == expected[f"uint8_{suffix}"]
        np.testing.assert_allclose(tfm.apply_box(box), expected[f"box_{suffix}"], rtol=1e-6)

    hflip, vflip = T.HFlipTransform(17), T.VFlipTransform(12)
    np.testing.assert_allclose(hflip.apply_box(box[:1]), expected["hflip_box"])
    np.testing.assert_allclose(vflip.apply_box(box[:1]), expected["vflip_box"])
    assert hflip.apply_image(image)[0].tolist() == expected["hflip_row0"]
    coords = np.array([[0.0, 0.0], [17.0, 12.0]])
    np.testing.assert_allclose(hflip.apply_coords(coords), expected["hflip_coords"])

    for kind, sequence in data["random_sequences"].items():
        augmentation = _RANDOM[kind]()
        np.random.seed(data["numpy_seed"])
        for described in sequence:
            tfm = augmentation.get_transform(image)
            attributes = [getattr(tfm, name) for name in _ATTRIBUTES if hasattr(tfm, name)]
            assert [type(tfm).__name__, *attributes] == described, kind

    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8, 10, 14), 25
    augmentations = T.AugmentationList(utils.build_augmentation(cfg, True))
    np.random.seed(data["numpy_seed"])
    for call in expected["default_train_list_seeded"]:
        aug_input = T.AugInput(image.copy())
        tfms = augmentations(aug_input)
        assert [type(tfm).__name__ for tfm in tfms.transforms] == call["types"]
        assert list(aug_input.image.shape) == call["shape"]
        assert int(aug_input.image.sum()) == call["sum"]
        np.testing.assert_allclose(tfms.apply_box(np.array([[1.0, 2.0, 10.0, 11.0]])), call["box"], rtol=1e-6)


def check_dataset_mapper(data, arrays, name, tmp_path):
    image = np.floor(hash_u("map31", 30 * 40 * 3) * 256).astype(np.uint8).reshape(30, 40, 3)
    Image.fromarray(image).save(tmp_path / "x.png")
    record = dict(data["record"], file_name=str(tmp_path / "x.png"))
    cfg = get_cfg()
    for key, value in data["config"].items():
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
        np.testing.assert_allclose(instances.gt_boxes.tensor.numpy(), call["gt_boxes"], rtol=1e-6)
        assert instances.gt_classes.tolist() == call["gt_classes"]
    assert "annotations" in record and record["annotations"] == data["record"]["annotations"]

    mapped, call = DatasetMapper(cfg, False)(record), data["test_call"]
    assert sorted(mapped) == call["keys"]
    assert list(mapped["image"].shape) == call["image_shape"]
    assert int(mapped["image"].sum()) == call["image_sum"]
    assert (mapped["height"], mapped["width"]) == (call["height"], call["width"])


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


def check_samplers(data, arrays, name, tmp_path):
    expected = dict(data["results"])
    for size, seed, (rank, world_size) in itertools.product((5, 10), (0, 42), ((0, 1), (0, 2), (1, 2))):
        recorded = expected.pop(f"training_n{size}_seed{seed}_rank{rank}of{world_size}")
        with _as_rank(rank, world_size):
            sampler = TrainingSampler(size, seed=seed)
        assert _first(sampler, len(recorded)) == recorded

    for seed in (0, 42):
        recorded = expected.pop(f"repeat_factor_seed{seed}")
        sampler = RepeatFactorTrainingSampler(torch.tensor(_REPEAT_FACTORS), seed=seed)
        assert _first(sampler, len(recorded)) == recorded

    dicts = [{"annotations": [{"category_id": c} for c in categories]} for categories in _CATEGORIES]
    for key, sqrt in (("repeat_factors_thr0.5", True), ("repeat_factors_thr0.5_nosqrt", False)):
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5, sqrt=sqrt)
        assert factors.tolist() == pytest.approx(expected.pop(key), rel=1e-6)

    for size, world_size in ((7, 1), (7, 3), (2, 4)):
        shards = []
        for rank in range(world_size):
            with _as_rank(rank, world_size):
                sampler = InferenceSampler(size)
            assert len(sampler) == len(list(sampler))
            shards.append(list(sampler))
        assert shards == expected.pop(f"inference_n{size}_world{world_size}")

    for seed in (0, 42):
        recorded = expected.pop(f"aspect_group_seed{seed}")
        records = [{"width": w, "height": h, "id": i} for i, (w, h) in enumerate(recorded["wh"])]
        batches = [[r["id"] for r in batch] for batch in AspectRatioGroupedDataset(records, 3)]
        assert batches == recorded["batches_of_3"]

    left_out = ("subset_", "training_noshuffle_")
    assert all(key.startswith(left_out) for key in expected), f"not checked: {sorted(expected)}"


def _first(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def check_builtin_datasets(data, arrays, name, tmp_path):
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for dataset, facts in data["datasets"].items():
        metadata = MetadataCatalog.get(dataset)
        for key, value in facts.items():
            if key in ("json_file", "image_root", "dirname"):
                value = os.path.join(root, os.path.relpath(value, "datasets"))
            assert getattr(metadata, key) == value, (dataset, key)
        if dataset.startswith("coco"):
            assert metadata.thing_classes == data["coco_thing_classes"]
            id_map = {str(k): v for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
            assert id_map == data["coco_id_map"]
        else:
            assert list(metadata.thing_classes) == data["voc_thing_classes"]


CHECKS = {
    "resize_shapes": check_resize_shapes,
    "transforms": check_transforms,
    "dataset_mapper": check_dataset_mapper,
    "samplers": check_samplers,
    "builtin_datasets": check_builtin_datasets,
}
