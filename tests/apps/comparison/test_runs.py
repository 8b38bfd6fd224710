"""What is read from an output folder, and what is refused."""

from __future__ import annotations

import re

import pytest

from d2_distill.apps.comparison.runs import common_test_set, read_curves, read_run
from d2_distill.errors import UserError

from .small_runs import METRICS, write_run


def test_finished_run(data, tmp_path):
    run = read_run(write_run(tmp_path / "run", data=data))
    assert run.finished and run.checkpoint == tmp_path / "run" / "model_final.pth" and run.iterations == 20
    assert run.metrics(data["TEST"][0]) == pytest.approx(METRICS, nan_ok=True)
    assert run.metric_curves(data["TEST"][0])["AP"] == {9: 10.0, 19: 20.0}
    assert run.last("train_seconds") == 50.25 * 20 and run.last("loss_pkd") is None


def test_later_value_of_a_repeated_iteration_counts(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        '{"iteration": 19, "total_loss": 1.0}\n'
        '{"iteration": 39, "total_loss": 0.5}\n'
        '{"iteration": 59, "tot\n'
        '{"iteration": 39, "total_loss": 0.25, "bbox/AP": 7.0}\n'
    )
    assert read_curves(path) == {"total_loss": {19: 1.0, 39: 0.25}, "bbox/AP": {39: 7.0}}


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.json"])
def test_what_is_no_output_folder_is_named(data, tmp_path, missing):
    (write_run(tmp_path / "run", data=data) / missing).unlink()
    with pytest.raises(UserError, match=f"run has no {missing}, so it is no output folder"):
        read_run(tmp_path / "run", unfinished=True)


@pytest.mark.parametrize("checkpoint", ["model_0000014.pth", ""])
def test_unfinished_run(data, tmp_path, checkpoint):
    folder = write_run(tmp_path / "run", data=data, checkpoint=checkpoint)
    with pytest.raises(UserError, match="run has no model_final.pth as its last checkpoint, so the run is not"):
        read_run(folder)
    run = read_run(folder, unfinished=True)
    assert not run.finished and run.checkpoint == (folder / checkpoint if checkpoint else None)


def test_finished_run_that_goes_on_is_unfinished(data, tmp_path):
    folder = write_run(tmp_path / "run", data=data)
    (folder / "last_checkpoint").write_text("model_0000029.pth")
    (folder / "model_0000029.pth").touch()
    run = read_run(folder, unfinished=True)
    assert not run.finished and run.checkpoint == folder / "model_0000029.pth"


def test_several_test_sets(data, tmp_path):
    """Detectron2 puts the name of the set before the metrics then."""
    name = data["TEST"][0]
    metrics = {"AP": 1.0}
    first = read_run(write_run(tmp_path / "a", data=data, metrics=metrics))
    folder = write_run(tmp_path / "b", data={**data, "TEST": ("other", name)}, metrics=metrics)
    path = folder / "metrics.json"
    path.write_text(path.read_text().replace('"bbox/AP": 1.0', f'"other/bbox/AP": 3.0, "{name}/bbox/AP": 1.0'))
    second = read_run(folder)
    assert first.metrics(name) == second.metrics(name) == metrics and second.metrics("other") == {"AP": 3.0}
    assert common_test_set([first, second]) == common_test_set([second, first], name) == name
    with pytest.raises(UserError, match=f"a was evaluated on {name}, not on other; .*--test-set"):
        common_test_set([second, first])


def test_numbers_from_other_data_are_refused(data, tmp_path):
    [(name, file, images)] = data["COCO"]
    first = read_run(write_run(tmp_path / "a", data=data))
    second = read_run(write_run(tmp_path / "b", data={**data, "COCO": ((name, file, "elsewhere"),)}))
    with pytest.raises(UserError, match=f"The DATASETS row of {name} is .*elsewhere.* in .*b and .* in .*a; numbers"):
        common_test_set([first, second])


def test_run_without_evaluation_is_refused(data, tmp_path):
    path = write_run(tmp_path / "run", data=data) / "metrics.json"
    path.write_text('{"iteration": 19, "total_loss": 1.0}\n')
    with pytest.raises(UserError, match=f"{re.escape(str(path))} holds no bbox/AP on {data['TEST'][0]}"):
        common_test_set([read_run(tmp_path / "run")])


def test_run_without_a_test_set_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="names no data set in DATASETS.TEST"):
        read_run(write_run(tmp_path / "run", data={"COCO": (), "TEST": ()}))
