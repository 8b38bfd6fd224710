"""A user's own detectors, in a file that IMPORTS names, through train_net.py and the tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import QUIET, ROOT, TINY, checkpoint, merged, scalars, write_config

FILE = Path(__file__).with_name("own_detectors.py")
KEYS = {
    "QueryDetector": "QUERIES.CLASSES",
    "OwnForward": "RETINANET.NUM_CLASSES",
    "OwnGFL": "GFL.NUM_CLASSES",
}
UNSIZED = {
    "RETINANET": {"NUM_CLASSES": 80},
    "GFL": {"NUM_CLASSES": 80, "IN_FEATURES": ["p3", "p4", "p5"], "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0},
}


def own(name: str, data, folder, **more):
    """The config of a plain run of two iterations."""
    model = {**UNSIZED, **more, "META_ARCHITECTURE": name}
    run = {"IMPORTS": [str(FILE)], "MODEL": model, "SOLVER": {"MAX_ITER": 2}, "OUTPUT_DIR": str(folder)}
    return merged(TINY, data, run)


def pair(student: str, teacher, data, folder, *methods, **more):
    """The config of a distillation of two iterations; ``teacher`` is the config and the checkpoint of a run."""
    config, weights = teacher
    distill = {"STUDENT": student, "METHODS": list(methods), "CROSSKD": {"CLS_TAP": 1, "BOX_TAP": 1}}
    distill["TEACHER"] = {"CONFIG_FILE": str(config), "WEIGHTS": str(weights)}
    return merged(own("Distiller", data, folder, **more), QUIET, {"MODEL": {"DISTILL": distill}})


@pytest.fixture(scope="module")
def query(server, data, tmp_path_factory):
    """A finished run of the query detector: config and checkpoint."""
    folder = tmp_path_factory.mktemp("query")
    config = write_config(folder / "query.yaml", own("QueryDetector", data, folder / "out"))
    server.run("--config-file", config).succeeded()
    return config, folder / "out" / "model_final.pth"


@pytest.mark.parametrize("name", KEYS)
def test_it_gets_the_classes_of_the_data(server, data, tmp_path, name):
    """By a key of one's own; by that of the class it is derived from, also without its stages."""
    config = write_config(tmp_path / "own.yaml", own(name, data, tmp_path / "out"))
    outcome = server.run("--config-file", config).succeeded()
    assert f"MODEL.{KEYS[name]} is 2 (it was 80), for the classes of the data set" in outcome.stdout
    assert scalars(tmp_path / "out")["bbox/AP"] >= 0
    state = checkpoint(tmp_path / "out" / "model_final.pth")["model"]
    assert len(state["scores.bias"]) == 3 if name == "QueryDetector" else len(state["head.cls_score.bias"]) == 2


def test_without_an_adapter_the_number_is_the_users(server, data, tmp_path):
    config = write_config(tmp_path / "own.yaml", own("NoAdapter", data, tmp_path / "out"))
    outcome = server.run("--config-file", config, "MODEL.PLAIN.CLASSES", 2).succeeded()
    assert "NoAdapter has no staged adapter that declares the config key of its number of classes" in outcome.stdout
    assert "set it for the 2 classes of the data set" in outcome.stdout and "(it was" not in outcome.stdout
    assert "bbox/AP" in scalars(tmp_path / "out")
    wrong = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "wrong")
    [error] = wrong.errors
    assert "The detector predicts class" in error and "'val_set' has only the 2 classes cat, dog" in error
    assert wrong.code == 1 and "Traceback" not in wrong.stderr and "no staged adapter" in wrong.stdout


@pytest.mark.parametrize("number", [1, 80])
def test_another_number_of_outputs_is_refused(server, data, tmp_path, number):
    run = own("CountedNoAdapter", data, tmp_path / "out", PLAIN={"CLASSES": number})
    outcome = server.run("--config-file", write_config(tmp_path / "own.yaml", run))
    [error] = outcome.errors
    assert f"CountedNoAdapter predicts {number} classes, but DATASETS.CLASSES has 2 (cat, dog)" in error
    assert outcome.code == 1 and "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["NoAdapter", "OwnForward"])
def test_what_has_no_stages_is_not_taught(server, data, query, tmp_path, name):
    config = write_config(tmp_path / "pair.yaml", pair(name, query, data, tmp_path / "out", "PKD"))
    outcome = server.run("--config-file", config)
    [error] = outcome.errors
    assert f"{name} has no staged adapter, without which it can neither teach, nor be taught or exported" in error
    assert outcome.code == 1 and "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()


def test_a_query_detector_is_taught(server, data, teacher, tmp_path):
    teacher = (teacher.config, teacher.weights)
    run = pair("QueryDetector", teacher, data, tmp_path / "out", "PKD", "FeatureImitation")
    server.run("--config-file", write_config(tmp_path / "pair.yaml", run)).succeeded()
    found = scalars(tmp_path / "out")
    assert all(found[term] > 0 for term in ("loss_pkd", "loss_imitation", "loss_box"))


def test_a_query_detector_teaches(server, data, query, tmp_path):
    run = pair("RetinaNet", query, data, tmp_path / "out", "PKD", "FeatureImitation")
    server.run("--config-file", write_config(tmp_path / "pair.yaml", run)).succeeded()
    found = scalars(tmp_path / "out")
    assert found["loss_pkd"] > 0 and found["loss_imitation"] > 0


@pytest.mark.parametrize("method", ["CrossKD", "CrossKDRoI", "HEAD", "LD", "TFHEAD"])
def test_other_methods_refuse_it(server, data, query, tmp_path, method):
    """As the student and as the teacher."""
    for student in ("QueryDetector", "RetinaNet"):
        if method == "TFHEAD" and student == "RetinaNet":  # it needs no teacher
            continue
        config = write_config(tmp_path / f"{student}.yaml", pair(student, query, data, tmp_path / "out", method))
        outcome = server.run("--config-file", config)
        assert outcome.code == 1 and "Traceback" not in outcome.stderr and not (tmp_path / "out").exists()
        [error] = outcome.errors
        assert "QueryDetector" in error and "Methods that serve this pair: " in error and "PKD" in error


def test_the_listing_names_its_family(server, data, query, tmp_path):
    config = write_config(tmp_path / "pair.yaml", pair("QueryDetector", query, data, tmp_path / "out", "PKD"))
    listed = " ".join(server.run("--list", "--config-file", config).succeeded().stdout.split())
    assert "Student QueryDetector: query; strides 8, 16, 32; 32 channels; 2 classes" in listed
    assert "Teacher QueryDetector: query; strides" in listed
    serving, others = listed.split("Methods that cannot serve it:")
    assert all(f" {method} " in serving for method in ("PKD", "FeatureImitation", "MSAD"))
    assert all(f" {method} " in others for method in ("CrossKD", "CrossKDRoI", "HEAD", "LD", "TFHEAD"))


def test_tools_know_it(server, data, query, tmp_path):
    config, weights = query
    pictures = data["DATASETS"]["COCO"][1][2]
    chosen = ("--config-file", config, "MODEL.WEIGHTS", weights)

    def tool(name, *arguments):
        return server.run(*arguments, script=ROOT / "tools" / f"{name}.py")

    checked = tool("check_teacher", "--images", 2, "--probe", 2, *chosen)
    assert "Traceback" not in checked.stderr and "QueryDetector" in checked.stdout
    shown = tool("predict", "--input", pictures, "--output", tmp_path / "shown", "--score-threshold", 0.0, *chosen)
    assert shown.succeeded() and len(list((tmp_path / "shown").rglob("*.*"))) == 5
    compared = tool("compare", f"mine={weights.parent}", "--output", tmp_path / "compared").succeeded()
    assert "mine" in compared.stdout
    exported = tool("export", "torchscript", "--output", tmp_path / "query.pt", "--noise", *chosen)
    assert exported.succeeded() and (tmp_path / "query.pt").exists()
    raw = tool("export", "torchscript", "--raw", "--output", tmp_path / "raw.pt", "--noise", *chosen)
    assert raw.code == 1 and "QueryDetector has no raw outputs" in raw.stderr and "Traceback" not in raw.stderr
