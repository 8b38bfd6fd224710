"""The report on data sets, its exit status, and the samples that are drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ..data.small_sets import write_coco, write_voc

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_data  # noqa: E402

WIDE = (60, 40)


@pytest.fixture
def run(capsys):
    """Runs the tool; its exit status, what it printed, and its errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            check_data.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = end.value.code
        return (1, captured.out, code) if isinstance(code, str) else (code, captured.out, captured.err)

    return run


def test_good_sets_from_the_command_line(run, tmp_path):
    _, json_file, images = write_coco(tmp_path / "mine", sizes=(WIDE,) * 3)
    write_voc(tmp_path / "voc", objects=([("cat", 3, 4, 20, 19)], [("dog", 3, 4, 20, 19)]))
    code, out, err = run("--train-data", json_file, images, "--test-data", tmp_path / "voc", "train")
    assert code == 0 and err == ""
    assert out.startswith(f"mine_set (DATASETS.TRAIN): {json_file}, images in {images}\n  nothing to complain of\n")
    assert f"voc_train (DATASETS.TEST): {tmp_path}/voc, split train\n  nothing to complain of" in out
    assert "| class   |   mine_set |   voc_train |" in out
    assert out.endswith("0 errors, 0 warnings\n")


def test_errors_and_warnings(run, tmp_path):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"][2] = 0

    row = write_coco(tmp_path, sizes=(WIDE,) * 3)
    bad = write_coco(tmp_path / "bad", sizes=(WIDE,) * 5, edit=edit)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({
        "VERSION": 2, "DATASETS": {"COCO": [list(row), list(bad)], "TRAIN": [row[0]], "TEST": [bad[0]]}
    }))
    code, out, _ = run("--config-file", tmp_path / "config.yaml", "--examples", 2)
    assert code == 1 and out.endswith("4 errors, 6 warnings\n"), out
    assert "  error        4 x boxes without area: correct or remove it\n" in out
    assert "image 1.png, annotation 2: the box [2, 3, 0, 6] has no area\n" in out and "and 2 more\n" in out
    assert f"{bad[2]}/1.png" not in out, "what the headline says is not repeated"
    code, out, _ = run("--config-file", tmp_path / "config.yaml", "DATASETS.TEST", "()")
    assert code == 0 and "bad_set" not in out


def test_samples(run, tmp_path):
    row = write_coco(tmp_path / "mine", sizes=(WIDE,) * 9)
    code, out, _ = run("--train-data", *row[1:], "--draw", tmp_path / "drawn", "--images", 3, "--no-decode")
    assert code == 0 and f"Samples are in {tmp_path}/drawn" in out
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["mine_set_01_0.jpg", "mine_set_02_3.jpg", "mine_set_03_6.jpg"]
    scale = 288 // 60
    picture = np.array(Image.open(drawn[0]))
    assert picture.shape == (40 * scale, 60 * scale, 3)


def test_what_cannot_be_asked(run, tmp_path):
    for arguments, sentence in (
        ((), "error: DATASETS.TRAIN and DATASETS.TEST are empty"),
        (("--config-file", tmp_path / "no.yaml"), "no.yaml"),
        (("--train-data", tmp_path / "no.json", tmp_path), "error: --train-data: there is no "),
    ):
        code, out, err = run(*arguments)
        assert code == 1 and out == "" and err.startswith("error: ") and sentence in err
