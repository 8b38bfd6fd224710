"""Checkpoints, the default trainer and the torchvision conversion against the recorded runs."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_setup
from fvcore.common.checkpoint import PeriodicCheckpointer
from PIL import Image
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.model_zoo import checkpoint_url
from d2_distill.detectors.building import build_detector
from d2_distill.engine import Trainer

from ..cases import Case
from ..recording import plain
from .d2_left_out import is_left_out

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from convert_torchvision_backbone import convert  # noqa: E402


def check_matching(case: Case) -> None:
    for entry in case.data["matching"]:
        model = {key: torch.zeros(plain(shape)) for key, shape in entry["model"].items()}
        entries = entry["ckpt_in_order_value_is_index_plus_1"].items()
        checkpoint = {
            key: torch.full(plain(shape), float(value)) for value, (key, shape) in enumerate(entries, 1)
        }
        description = entry["desc"]
        if "raises" in entry:
            assert entry["raises"] == "ValueError"
            with pytest.raises(ValueError):
                align_and_update_state_dicts(model, checkpoint, c2_conversion=entry["c2"])
            continue
        result = align_and_update_state_dicts(model, checkpoint, c2_conversion=entry["c2"])
        found = {key: {"shape": list(value.shape), "first_value": value.flatten()[0].item()}
                 for key, value in result.items()}
        assert found == entry["result"], description
    _check_caffe2_names(case.data["c2_basic_names"])
    _check_caffe2_detector(case.data["c2_detectron"])


def _check_caffe2_names(names):
    # One at a time: two of the recorded names become the same one.
    for old, new in names.items():
        result = align_and_update_state_dicts({new: torch.zeros(1)}, {old: torch.ones(1)}, c2_conversion=True)
        assert list(result) == [new], old


def _check_caffe2_detector(data):
    assert data["values_are"] == "arange reshaped"
    inputs = {key: plain(shape) for key, shape in data["inputs"].items()}
    checkpoint = {key: torch.arange(float(np.prod(shape))).reshape(shape) for key, shape in inputs.items()}
    model = {out["new_name"]: torch.zeros(plain(out["new_shape"])) for out in data["outputs"].values()}
    result = align_and_update_state_dicts(model, checkpoint, c2_conversion=True)
    assert set(result) == set(model)
    for old, expected in data["outputs"].items():
        value = result[expected["new_name"]]
        assert list(value.shape) == expected["new_shape"], old
        assert value.flatten()[:3].tolist() == expected["first3"], old


def _small_model():
    """A layer called backbone.fc, filled with zeros; the files of the cases hold sums of 4 for it."""
    model = nn.Sequential(OrderedDict(backbone=nn.Sequential(OrderedDict(fc=nn.Linear(4, 4)))))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


_WEIGHT, _BIAS = np.eye(4, dtype=np.float32), np.ones(4, dtype=np.float32)


def _arrays(prefix):
    return {f"{prefix}fc.weight": _WEIGHT.copy(), f"{prefix}fc.bias": _BIAS.copy()}


def _tensors(prefix):
    return {key: torch.from_numpy(value) for key, value in _arrays(prefix).items()}


# description of the recorded case -> (file name, content, query)
_FILES = {
    ".pkl with model+__author__ (numpy), no heuristics, exact names":
        ("a.pkl", {"model": _arrays("backbone."), "__author__": "x"}, ""),
    ".pkl with model+__author__ and matching_heuristics, short names":
        ("b.pkl", {"model": _arrays(""), "__author__": "x", "matching_heuristics": True}, ""),
    ".pkl with blobs (Caffe2); _momentum entries dropped":
        ("c.pkl", {"blobs": {"fc_w": _WEIGHT, "fc_b": _BIAS, "fc_w_momentum": _WEIGHT}}, ""),
    ".pth bare state dict": ("d.pth", _tensors("backbone."), ""),
    ".pth with model key and module. prefix (DDP)": ("e.pth", {"model": _tensors("module.backbone.")}, ""),
    ".pth short names, no query": ("f.pth", {"model": _tensors("")}, ""),
    ".pth short names with ?matching_heuristics=True":
        ("g.pth", {"model": _tensors("")}, "?matching_heuristics=True"),
    ".pth with unknown query": ("h.pth", {"model": _tensors("backbone.")}, "?heuristics=1"),
    ".pth with wrong shape":
        ("i.pth", {"model": {**_tensors("backbone."), "backbone.fc.weight": torch.ones(2, 2)}}, ""),
    ".pth extra top-level keys":
        ("j.pth", {"model": _tensors("backbone."), "iteration": 7, "foo": "bar"}, ""),
    ".pyth pycls": ("k.pyth", {"model_state": _tensors("")}, ""),
}


def check_files(case: Case) -> None:
    """The descriptions of the cases tell what is in a file."""
    _check_saved_files(case.data["save"], case.scratch / "saved")
    for entry in case.data["load_cases"]:
        file_name, content, query = _FILES[entry["desc"]]
        path = case.scratch / file_name
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        model = _small_model()
        if "raises" in entry:
            assert entry["raises"] == "ValueError"
            with pytest.raises(ValueError):
                DetectionCheckpointer(model).load(f"{path}{query}")
            continue
        rest = DetectionCheckpointer(model).load(f"{path}{query}")
        assert model.backbone.fc.weight.sum().item() == entry["loaded_weight_sum"], entry["desc"]
        assert model.backbone.fc.bias.sum().item() == entry["loaded_bias_sum"], entry["desc"]
        assert sorted(rest) == entry["returned_keys"], entry["desc"]


def _check_saved_files(expected, folder):
    folder.mkdir()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(folder), optimizer=optimizer)
    iteration = expected["iteration"]
    PeriodicCheckpointer(checkpointer, period=iteration + 1).step(iteration)
    assert sorted(path.name for path in folder.iterdir()) == expected["files"]
    assert (folder / "last_checkpoint").read_text() == expected["last_checkpoint_content"]
    content = torch.load(checkpointer.get_checkpoint_file())
    assert sorted(content) == expected["top_level_keys"]
    assert sorted(content["model"]) == expected["model_keys"]
    assert content["iteration"] == iteration


def check_torchvision_names(case: Case) -> None:
    """The end of the case's name is the network."""
    model = getattr(torchvision.models, case.name[len("torchvision_names_") :])()
    state_dict, data = model.state_dict(), plain(case.data)
    assert set(state_dict) == set(data)
    converted = convert(state_dict)
    assert converted["__author__"] == "torchvision" and converted["matching_heuristics"] is True
    assert {key: list(value.shape) for key, value in converted["model"].items()} == dict(data.values())
    for old, (new, _) in data.items():
        assert isinstance(converted["model"][new], np.ndarray)
        assert np.array_equal(converted["model"][new], state_dict[old].numpy())


def check_model_zoo(case: Case) -> None:
    data = case.data
    if is_left_out(case, "model zoo"):
        return
    assert data["url"] == 'prefix + name + "/" + suffix'
    for name, suffix in data["name_to_suffix"].items():
        assert checkpoint_url(f"{name}.yaml", key=name) == f"{data['prefix']}{name}/{suffix}"


def _write_dataset(folder: Path) -> str:
    """Four noisy images with a small box of class a and a large one of class b; returns the json file."""
    rng = np.random.RandomState(0)
    images, annotations = [], []
    for index in range(1, 5):
        Image.fromarray(rng.randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
        for category, side in ((1, 16), (2, 40)):
            annotations.append({"id": 2 * index + category, "image_id": index, "category_id": category,
                                "bbox": [4 * index, 4, side, side], "area": side * side, "iscrowd": 0})
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations,
                                "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}))
    return str(path)


def _trainer_cfg(dataset: str, output_dir: str):
    cfg = get_distill_cfg()
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu",
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS", 16,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RETINANET.NUM_CLASSES", 2,
        "MODEL.RETINANET.NUM_CONVS", 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0,
        "MODEL.WEIGHTS", "",
        "DATASETS.TRAIN", (dataset,),
        "DATASETS.TEST", (dataset,),
        "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,),
        "INPUT.MIN_SIZE_TEST", 64,
        "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.BASE_LR", 0.001,
        "SOLVER.MAX_ITER", 6,
        "SOLVER.STEPS", (4,),
        "SOLVER.WARMUP_ITERS", 0,
        "SOLVER.CHECKPOINT_PERIOD", 3,
        "TEST.EVAL_PERIOD", 3,
        "SEED", 1,
        "OUTPUT_DIR", output_dir,
    ])
    return cfg


def check_default_trainer_run(case: Case) -> None:
    dataset, output = "golden_default_trainer_run", case.scratch / "output"
    register_coco_instances(dataset, {}, _write_dataset(case.scratch), str(case.scratch))
    try:
        _check_run(plain(case.data), _trainer_cfg(dataset, str(output)), output)
    finally:
        DatasetCatalog.remove(dataset)
        MetadataCatalog.remove(dataset)


# Hooks that the project adds to DefaultTrainer's, and what they write.
_OWN_HOOKS = {"SeedEveryStep", "LossNormalizers", "TrainingClock", "BestCheckpoint", "StopOnSignal"}
_OWN_SCALARS = {"train_seconds"}
# What takes the place of one of Detectron2's.
_IN_PLACE = {"PeriodicEvaluation": "EvalHook"}


def _check_run(data, cfg, output):
    default_setup(cfg, None)
    trainer = Trainer(cfg, build_detector(cfg))
    trainer.resume_or_load(resume=False)
    hooks = [type(hook).__name__ for hook in trainer._hooks]
    assert [_IN_PLACE.get(name, name) for name in hooks if name not in _OWN_HOOKS] == data["hooks_in_order"]
    assert type(trainer.train()).__name__ == data["train_returns"]

    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [[sorted(line.keys() - _OWN_SCALARS)] for line in lines] == data["metrics_json_keys_per_line"]
    assert [line["iteration"] for line in lines] == data["metrics_json_iterations"]
    assert [[line["iteration"], line.get("lr")] for line in lines] == [
        [iteration, lr if lr is None else pytest.approx(lr)] for iteration, lr in data["lr_values"]]

    # model_best.pth is the project's, log.txt and config.yaml are default_setup's; TensorBoard's files depend on its being installed.
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    others = {file for file in files if file.startswith("events.")} | {"log.txt", "config.yaml", "model_best.pth"}
    assert sorted(files - others) == data["files"]
    assert (output / "last_checkpoint").read_text() == data["last_checkpoint"]

    checkpoint = torch.load(output / "model_final.pth")
    assert sorted(checkpoint) == data["checkpoint_top_keys"]
    assert checkpoint["iteration"] == data["checkpoint_iteration"]
    state = checkpoint["trainer"]
    assert sorted(state.pop("_trainer")) == data["checkpoint_trainer__trainer_keys"]
    state["hooks"] = {name: value for name, value in state["hooks"].items() if name not in _OWN_HOOKS}
    assert state["hooks"]["LRScheduler"] == data["checkpoint_scheduler"]
    state["hooks"]["LRScheduler"]["base_lrs"] = "list"  # recorded so
    assert state == data["checkpoint_trainer"]

    resumed = Trainer(cfg, build_detector(cfg))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == data["after_resume_start_iter"]
    assert resumed.scheduler.state_dict() == data["checkpoint_scheduler"]


CHECKS = {
    "checkpoint_matching": check_matching,
    "checkpoint_files": check_files,
    "torchvision_names": check_torchvision_names,
    "model_zoo_urls": check_model_zoo,
    "default_trainer_run": check_default_trainer_run,
}
