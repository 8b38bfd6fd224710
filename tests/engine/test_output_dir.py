"""An output folder is not overwritten by another run, and a run is resumed only as itself."""

from __future__ import annotations

import pytest
import torch
import yaml

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.output_dir import claim_output_dir, end_last_line
from d2_distill.errors import UserError


@pytest.fixture
def run(tmp_path):
    """The config of a run with a checkpoint, whose folder holds what training writes."""
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATASETS.TRAIN = ("mine",)
    cfg.DATASETS.COCO = (("mine", "mine.json", "mine"), ("other", "other.json", "other"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(cfg.dump())
    (tmp_path / "out" / "metrics.json").write_text('{"iteration": 1}\n')
    torch.save({"model": {}, "trainer": {}, "iteration": 1}, tmp_path / "out" / "model_0000001.pth")
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    return cfg


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("resume", [False, True])
def test_new_and_empty_folders_are_free(tmp_path, resume):
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    claim_output_dir(cfg, resume=resume)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("A: 1")  # of a run that failed before it began
    (tmp_path / "out" / "metrics.json").write_text("")
    claim_output_dir(cfg, resume=resume)
    assert (tmp_path / "out" / "config.yaml").read_text() == "A: 1"


@pytest.mark.parametrize("left", ["last_checkpoint", "metrics.json", "model_0000001.pth"])
def test_another_run_is_refused_without_resume(run, tmp_path, left):
    for name in {"last_checkpoint", "metrics.json", "model_0000001.pth"} - {left}:
        (tmp_path / "out" / name).unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=rf"{run.OUTPUT_DIR} holds a run already \({left}\).*--resume"):
        claim_output_dir(run, resume=False)
    assert contents(tmp_path / "out") == before


def test_file_in_place_of_the_folder(tmp_path):
    cfg = get_distill_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR .*out is a file"):
        claim_output_dir(cfg, resume=False)


def test_same_run_is_resumed(run):
    claim_output_dir(run, resume=True)


@pytest.mark.parametrize("key, value", [
    ("SOLVER.MAX_ITER", 7),
    ("SOLVER.STEPS", (5,)),
    ("SOLVER.CHECKPOINT_PERIOD", 3),
    ("SOLVER.CHECKPOINTS_KEPT", 3),
    ("SOLVER.EARLY_STOPPING.PATIENCE", 3),
    ("TEST.SAVE_BEST", False),
    ("TEST.EVAL_PERIOD", 3),
    ("DATALOADER.NUM_WORKERS", 0),
    ("DATASETS.TEST", ("mine",)),
    ("DATASETS.COCO", (("mine", "mine.json", "mine"),)),
    ("MODEL.DEVICE", "cpu"),
    ("MODEL.WEIGHTS", "other.pth"),
])
def test_what_may_change(run, key, value):
    run.merge_from_list([key, value])
    claim_output_dir(run, resume=True)


@pytest.mark.parametrize("key, value, sentence", [
    ("SOLVER.IMS_PER_BATCH", 3, "SOLVER.IMS_PER_BATCH was 16 and is 3"),
    ("SOLVER.BASE_LR", 0.5, "SOLVER.BASE_LR was 0.001 and is 0.5"),
    ("SEED", 5, "SEED was -1 and is 5"),
    ("SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.ACCUMULATION_STEPS was 1 and is 2"),
    ("SOLVER.EMA.DECAY", 0.5, "SOLVER.EMA.DECAY was 0.9998 and is 0.5"),
    ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.ENABLED was False and is True"),
    ("INPUT.MIN_SIZE_TRAIN", (100,), r"INPUT.MIN_SIZE_TRAIN was \[800\] and is \[100\]"),
    ("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES was 80 and is 3"),
    ("MODEL.DISTILL.STUDENT", "FCOS", "MODEL.DISTILL.STUDENT was 'RetinaNet' and is 'FCOS'"),
    ("DATASETS.TRAIN", ("other",), "DATASETS.COCO was .* DATASETS.TRAIN was .'mine'. and is .'other'."),
    ("DATASETS.COCO", (("mine", "new.json", "mine"),), "DATASETS.COCO was .*mine.json.* and is .*new.json.*"),
])
def test_what_defines_a_run(run, tmp_path, key, value, sentence):
    before = contents(tmp_path / "out")
    run.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{run.OUTPUT_DIR} holds .* another config: {sentence}; resume"):
        claim_output_dir(run, resume=True)
    assert contents(tmp_path / "out") == before


def test_weights_define_a_run_before_its_first_checkpoint(run, tmp_path):
    for name in ("last_checkpoint", "model_0000001.pth"):
        (tmp_path / "out" / name).unlink()
    run.MODEL.WEIGHTS = "other.pth"
    with pytest.raises(UserError, match="MODEL.WEIGHTS was '' and is 'other.pth'"):
        claim_output_dir(run, resume=True)


def test_many_differences_are_counted(run):
    run.merge_from_list(["SEED", 1, "SOLVER.BASE_LR", 0.5, "SOLVER.GAMMA", 0.5, "INPUT.FORMAT", "RGB"])
    with pytest.raises(UserError, match="INPUT.FORMAT was .*, SEED was .*, SOLVER.BASE_LR .* and 1 more; "):
        claim_output_dir(run, resume=True)


@pytest.mark.parametrize("text", [None, "A: [", "just text"])
def test_run_whose_config_is_lost(run, tmp_path, text):
    path = tmp_path / "out" / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"holds a run whose {path} cannot be read; restore it"):
        claim_output_dir(run, resume=True)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_start_that_was_killed_is_resumed(run, tmp_path, part):
    """It leaves the beginning of the config that it wrote."""
    text = run.dump()
    (tmp_path / "out" / "config.yaml").write_text(text[: int(len(text) * part)])
    claim_output_dir(run, resume=True)


def test_a_run_of_an_earlier_version_is_resumed(run, tmp_path):
    """Its config lacks later keys, whose defaults are what it did; other values are another run."""
    path = tmp_path / "out" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["MODEL"]["DISTILL"]["NORMALIZE_PER_PROCESS"], stored["SOLVER"]["EMA"]
    path.write_text(yaml.safe_dump(stored))
    claim_output_dir(run, resume=True)
    run.SOLVER.EMA.ENABLED = True
    with pytest.raises(UserError, match="SOLVER.EMA.ENABLED was False and is True"):
        claim_output_dir(run, resume=True)


def test_weights_alone_are_nothing_to_continue_from(run, tmp_path):
    (tmp_path / "out" / "model_0000001.pth").unlink()
    torch.save({"model": {}}, tmp_path / "out" / "model_final.pth")
    with pytest.raises(UserError, match="no checkpoint to continue from: model_final.pth is damaged or without the state"):
        claim_output_dir(run, resume=True)


@pytest.mark.parametrize("content, expected", [
    (b'{"iteration": 1}\n{"iter', b'{"iteration": 1}\n'), (b'{"iteration": 1}\n', b'{"iteration": 1}\n'), (b'{"it', b""), (b"", b""),
])
def test_half_a_line_is_cut(tmp_path, content, expected):
    (tmp_path / "metrics.json").write_bytes(content)
    end_last_line(str(tmp_path / "metrics.json"))
    assert (tmp_path / "metrics.json").read_bytes() == expected
    end_last_line(str(tmp_path / "none.json"))
