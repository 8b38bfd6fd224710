"""Bad input ends a run with status 1 and one sentence that names key, file or image and the remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ..data.small_sets import write_coco
from .conftest import write_scenes
from .runs import FASTER_RCNN, QUIET, TINY, checkpoint, contents, distiller, merged, write_config


@pytest.fixture
def refuse(server, tmp_path):
    """Runs a config, with arguments, and checks how it is refused; its output folder is tmp_path / "out"."""
    folder = tmp_path / "out"

    def refuse(config, *arguments, says, processes=1, writes=False):
        path = write_config(tmp_path / "config.yaml", config, {"OUTPUT_DIR": str(folder)})
        before = contents(folder) if folder.exists() else None
        outcome = server.run("--config-file", path, *arguments, processes=processes)
        assert set(outcome.codes) == {1}, outcome
        assert "Traceback" not in outcome.stdout + outcome.stderr, outcome
        assert len(outcome.errors) == 1, outcome.stderr
        for part in says:
            assert str(part) in outcome.errors[0], outcome.errors[0]
        if not writes:
            assert (contents(folder) if folder.exists() else None) == before
        return outcome

    return refuse


@pytest.fixture
def distilled_config(data, teacher):
    def make(*methods):
        return merged(TINY, data, distiller(teacher.config, teacher.weights, *methods))

    return make


def test_config_file_missing(server, tmp_path):
    outcome = server.run("--config-file", tmp_path / "none.yaml", "OUTPUT_DIR", tmp_path / "out")
    assert outcome.code == 1 and len(outcome.errors) == 1 and str(tmp_path / "none.yaml") in outcome.errors[0]
    assert "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "opts, says",
    [
        (("SOLVER.BASE_LRR", "0.1"), ["SOLVER.BASE_LRR", "correct it"]),
        (("SOLVER.BASE_LR", "fast"), ["SOLVER.BASE_LR", "float", "str"]),
        (("SOLVER.BASE_LR",), ["SOLVER.BASE_LR", "odd length"]),
        (("SOLVER.BASE_LR", "0.1", "--resume"), ["--resume stands behind config keys"]),
    ],
)
def test_key_or_value(refuse, data, opts, says):
    refuse(merged(TINY, data), *opts, says=says)


def test_student_weights_unreadable(refuse, data, tmp_path):
    weights = tmp_path / "broken.pth"
    weights.write_bytes(b"no checkpoint")
    says = ["MODEL.WEIGHTS", weights, "replace it"]
    refuse(merged(TINY, data), "MODEL.WEIGHTS", weights, says=says, writes=True)
    assert not list((tmp_path / "out").glob("*.pth"))


def test_not_yaml(server, tmp_path):
    (tmp_path / "bad.yaml").write_text("SOLVER: [1\n")
    outcome = server.run("--config-file", tmp_path / "bad.yaml", "OUTPUT_DIR", tmp_path / "out")
    assert outcome.code == 1 and len(outcome.errors) == 1 and "bad.yaml" in outcome.errors[0]


@pytest.mark.parametrize(
    "opts, says",
    [
        (("MODEL.META_ARCHITECTURE", "RetinaNets"), ["MODEL.META_ARCHITECTURE", "RetinaNets", "RetinaNet,"]),
        (("MODEL.WEIGHTS", "none.pth"), ["MODEL.WEIGHTS", "none.pth"]),
        (("DATASETS.TRAIN", "()"), ["DATASETS.TRAIN is empty"]),
        (("DATASETS.TRAIN", "('train_sets',)"), ["DATASETS.TRAIN", "train_sets", "train_set?"]),
        (("DATASETS.CLASSES", "('cat', 'cow')"), ["DATASETS.TRAIN", "DATASETS.CLASSES", "they differ in cow, dog"]),
        (
            ("SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "4"),
            ["SOLVER.IMS_PER_BATCH is 4", "REFERENCE_WORLD_SIZE 8", "set REFERENCE_WORLD_SIZE to 0"],
        ),
        (("SOLVER.AMP.ENABLED", "True"), ["SOLVER.AMP.ENABLED", "set it to False or MODEL.DEVICE to cuda"]),
        (("--eval-only",), ["MODEL.WEIGHTS is empty"]),
        (("--eval-only", "MODEL.WEIGHTS", "none.pth"), ["MODEL.WEIGHTS", "none.pth"]),
    ],
)
def test_plain_run(refuse, data, opts, says):
    refuse(merged(TINY, data), *opts, says=says)


@pytest.mark.parametrize(
    "key, value, says",
    [("SOLVER.OPTIMIZER", "Lion", "AdamW"), ("DATALOADER.SAMPLER_TRAIN", "Random", "TrainingSampler")],
)
def test_folder_in_which_nothing_was_trained_is_free_again(refuse, server, data, tmp_path, key, value, says):
    refuse(merged(TINY, data, QUIET), key, value, says=[key, value, says], writes=True)
    server.run("--config-file", tmp_path / "config.yaml", "SOLVER.MAX_ITER", 1).succeeded()


def test_evaluation_of_another_model_s_weights(refuse, data, teacher):
    arguments = ("--eval-only", "MODEL.WEIGHTS", teacher.weights)
    refuse(merged(TINY, data), *arguments, says=["MODEL.WEIGHTS", teacher.weights, "mis-shaped"])


class TestDistillation:
    def test_unknown_method(self, refuse, distilled_config):
        refuse(distilled_config("CrossKd"), says=["MODEL.DISTILL.METHODS", "CrossKd", "CrossKD"])

    def test_impossible_pair(self, refuse, data, distilled_config, server, tmp_path):
        """Also with several processes there is one sentence."""
        short = {"SOLVER": {"MAX_ITER": 1}}
        teacher = write_config(tmp_path / "rcnn.yaml", TINY, FASTER_RCNN, data, QUIET, short)
        server.run("--config-file", teacher, "OUTPUT_DIR", tmp_path / "rcnn").succeeded()
        config = merged(TINY, data, distiller(teacher, tmp_path / "rcnn" / "model_final.pth", "CrossKD"))
        for processes in (1, 2):
            refuse(config, processes=processes, says=["CrossKD", "GeneralizedRCNN", "RetinaNet", "PKD"])

    def test_teacher_config_missing(self, refuse, distilled_config):
        config, key = distilled_config("PKD"), "MODEL.DISTILL.TEACHER.CONFIG_FILE"
        refuse(config, key, "none.yaml", says=[key, "none.yaml"])
        refuse(config, key, "", says=[key, "PKD"])
        refuse(config, "MODEL.DISTILL.TEACHER.OPTS", "['A.B', 1]", says=["MODEL.DISTILL.TEACHER", "A.B"])

    def test_teacher_weights_missing(self, refuse, distilled_config):
        config, key = distilled_config("PKD"), "MODEL.DISTILL.TEACHER.WEIGHTS"
        refuse(config, key, "none.pth", says=[key, "none.pth", "train"])
        refuse(config, key, "", says=[key, "name its checkpoint"])

    def test_teacher_weights_that_do_not_fit(self, refuse, distilled_config, plain, teacher, tmp_path):
        config, key = distilled_config("PKD"), "MODEL.DISTILL.TEACHER.WEIGHTS"
        names = ["mis-shaped: backbone.", " more)"]
        refuse(config, key, plain.weights, says=[key, plain.weights, *names])
        weights = tmp_path / "changed.pth"
        state = checkpoint(teacher.weights)["model"]
        state["head.extra.weight"] = state.pop("head.cls_score.weight")
        torch.save({"model": state}, weights)
        names = ["1 missing: head.cls_score.weight", "1 unexpected: head.extra.weight"]
        refuse(config, key, weights, says=[key, weights, *names])
        weights.write_bytes(b"no checkpoint")
        refuse(config, key, weights, says=[key, weights, "cannot be read"])

    def test_other_class_list(self, refuse, data, server, teacher, tmp_path):
        """Student and teacher have two classes each, but not the same."""
        row = write_coco(tmp_path / "mice", classes=("cat", "mouse"))
        datasets = {"DATASETS": {"COCO": [row], "TRAIN": [row[0]]}}
        other = write_config(tmp_path / "teacher.yaml", {"_BASE_": str(teacher.config)}, datasets)
        config = merged(TINY, data, distiller(other, teacher.weights, "CrossKD"))
        refuse(config, says=["CrossKD", "'dog'", "its own are cat, mouse"])


class TestData:
    @pytest.fixture
    def own(self, tmp_path):
        """A data set of the test, and the config that trains on it."""
        row = write_scenes(tmp_path / "own")
        return row, merged(TINY, QUIET, {"DATASETS": {"COCO": [row], "TRAIN": [row[0]]}})

    def edit(self, row, change):
        with open(row[1]) as file:
            content = json.load(file)
        change(content)
        with open(row[1], "w") as file:
            json.dump(content, file)

    def test_annotation_file(self, refuse, own, tmp_path):
        """Also with several processes, which train_net.py itself may have started, there is one sentence."""
        row, config = own
        path = tmp_path / "own" / "set.json"
        path.write_text("{")
        refuse(config, processes=2, says=[row[0], path, "not valid JSON"])
        path.write_text('{"a": 1}')
        refuse(config, "--num-gpus", 2, "--dist-url", "auto", says=[row[0], path, "not a COCO annotation file"])
        path.unlink()
        refuse(config, says=[row[0], path, "cannot be read"])

    def test_empty(self, refuse, own):
        row, config = own
        self.edit(row, lambda content: content.update(annotations=[]))
        refuse(config, says=[row[0], "none with a usable"])
        self.edit(row, lambda content: content.update(images=[]))
        refuse(config, says=[row[0], "annotation"])

    def test_box_of_no_area(self, refuse, own):
        row, config = own
        self.edit(row, lambda content: content["annotations"][1].update(bbox=[3, 3, 0, 5]))
        refuse(config, processes=2, says=[row[0], "1.png", "has no area", "remove it"])

    def test_test_set_of_other_classes(self, refuse, own, tmp_path):
        row, config = own
        other = write_coco(tmp_path / "other", classes=("cat", "cow"))
        datasets = {"DATASETS": {"COCO": [row, other], "TEST": [other[0]]}}
        refuse(merged(config, datasets), says=["DATASETS.TEST", other[0], "cow, dog"])

    @pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0)])
    def test_corrupt_image_met_in_training(self, refuse, own, tmp_path, processes, workers):
        row, config = own
        image = tmp_path / "own" / "images" / "2.png"
        image.write_bytes(image.read_bytes()[:200])
        refuse(
            config, "DATALOADER.NUM_WORKERS", workers, processes=processes, writes=True,
            says=["The image", image, "restore it or remove it"],
        )
        logs = "".join(path.read_text() for path in (tmp_path / "out").glob("log.txt*"))
        assert f" The image {image}" in logs
        assert not (tmp_path / "out" / "model_final.pth").exists()

    @pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0)])
    def test_corrupt_image_met_in_evaluation(self, refuse, own, teacher, tmp_path, processes, workers):
        row, config = own
        image = tmp_path / "own" / "images" / "5.png"
        image.write_bytes(b"no image")
        refuse(
            merged(config, {"DATASETS": {"TEST": [row[0]]}}), "--eval-only", "MODEL.WEIGHTS", teacher.weights,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "DATALOADER.NUM_WORKERS", workers,
            processes=processes, writes=True, says=["The image", image],
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_loss_that_is_not_finite(refuse, data, tmp_path, processes):
    refuse(
        merged(TINY, data, QUIET), "SOLVER.BASE_LR", 1e30, "SOLVER.OPTIMIZER", "SGD",
        processes=processes, writes=True,
        says=["not finite at iteration", "loss_cls", "SOLVER.BASE_LR", "SOLVER.CLIP_GRADIENTS"],
    )
    assert "The loss is not finite" in (tmp_path / "out" / "log.txt").read_text()
    assert not list((tmp_path / "out").glob("*.pth"))


def test_folder_of_another_run(refuse, data, plain, tmp_path):
    shutil.copytree(plain.folder, tmp_path / "out")
    config = merged(TINY, data)
    refuse(config, says=["OUTPUT_DIR", tmp_path / "out", "holds a run already", "--resume"])
    says = ["OUTPUT_DIR", tmp_path / "out", "SOLVER.BASE_LR was 0.001 and is 0.5"]
    refuse(config, "--resume", "SOLVER.BASE_LR", 0.5, processes=2, says=says)


def test_folder_that_cannot_be_made(refuse, data):
    refuse(merged(TINY, data), "OUTPUT_DIR", "/dev/null/out", says=["OUTPUT_DIR: /dev/null/out cannot be used"])


def test_failed_resume_overwrites_nothing(refuse, distilled, teacher, tmp_path):
    """The teacher's weights have gone since."""
    shutil.copytree(distilled.folder, tmp_path / "out")
    stored = tmp_path / "out" / "config.yaml"
    stored.write_text(stored.read_text().replace(str(teacher.weights), "gone.pth"))
    config = {"_BASE_": str(stored)}
    refuse(config, "--resume", "SOLVER.MAX_ITER", 20, says=["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"])
