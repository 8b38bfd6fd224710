"""Which runs are seeds of one model, and how models are called."""

from __future__ import annotations

import pytest

from d2_distill.apps.comparison.groups import group_runs, notes
from d2_distill.apps.comparison.runs import read_run
from d2_distill.errors import UserError

from .small_runs import write_run


def grouped(*folders, names=None):
    runs = [read_run(folder, unfinished=True) for folder in folders]
    groups = group_runs(list(zip(names or [""] * len(runs), runs)))
    return groups, {group.name: [run.folder for run in group.runs] for group in groups}


def test_equal_configs_but_for_the_seed_are_one_model(data, tmp_path):
    plain = [write_run(tmp_path / "plain" / f"seed{seed}", data=data, seed=seed) for seed in (1, 2)]
    deep = [write_run(tmp_path / f"deep_seed{seed}", data=data, seed=seed, RETINANET__NUM_CONVS=3) for seed in (1, 2)]
    groups, found = grouped(plain[0], deep[0], deep[1], plain[1])
    assert found == {"plain": plain, "deep": deep}
    assert notes(groups, data["TEST"][0]) == []


def test_the_same_name_makes_one_model(data, tmp_path):
    a = write_run(tmp_path / "a", data=data)
    b = write_run(tmp_path / "b", data=data, RETINANET__NUM_CONVS=1)
    groups, found = grouped(a, b, names=["mine", "mine"])
    assert found == {"mine": [a, b]}
    different, same_seed = notes(groups, data["TEST"][0])
    assert different.startswith("The runs of mine differ not in their seed alone but in MODEL.RETINANET.NUM_CONVS; ")
    assert same_seed == "Runs of mine have the same SEED, so their spread says little."


def test_names_are_as_long_as_it_takes(data, tmp_path):
    paths = [tmp_path / "x" / "student", tmp_path / "y" / "student", tmp_path / "y" / "seed1", tmp_path / "y" / "seed2"]
    folders = [write_run(path, data=data, RETINANET__NUM_CONVS=n + 1) for n, path in enumerate(paths[:2])]
    assert list(grouped(*folders)[1]) == ["x/student", "y/student"]
    assert list(grouped(*folders, names=["student", ""])[1]) == ["student", "y/student"]
    seeds = [write_run(path, data=data, seed=n, RETINANET__NUM_CONVS=n + 3) for n, path in enumerate(paths[2:])]
    assert list(grouped(*seeds)[1]) == [str(path) for path in paths[2:]]


def test_a_folder_is_given_once(data, tmp_path):
    folder = write_run(tmp_path / "run", data=data)
    with pytest.raises(UserError, match="run is given twice"):
        grouped(folder, folder / ".." / "run", names=["a", "b"])


def test_unfinished_runs_are_told(data, tmp_path):
    folder = write_run(tmp_path / "run", data=data, checkpoint="")
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 29, "total_loss": 1.0}\n')
    groups, _ = grouped(folder)
    assert groups[0].title == "run *"
    assert notes(groups, data["TEST"][0]) == [
        f"{folder} (run) is not finished: 30 iterations.",
        f"{folder} (run) was last evaluated after 20 of 30 iterations.",
    ]


def test_the_first_run_with_a_checkpoint_stands_for_all(data, tmp_path):
    bare = write_run(tmp_path / "run_seed1", data=data, checkpoint="")
    whole = write_run(tmp_path / "run_seed2", data=data, seed=2)
    [group], _ = grouped(bare, whole)
    assert group.first.folder == whole
