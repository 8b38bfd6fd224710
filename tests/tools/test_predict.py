"""tools/predict.py: pictures, videos and rows from real detectors, and what is named, left out and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.checkpoint import DetectionCheckpointer
from PIL import Image

from d2_distill.apps.inference.predictor import Predictor
from d2_distill.apps.inference.video import VideoFile, VideoSource, Window
from d2_distill.apps.pictures import draw_detections
from d2_distill.apps.pictures.detections import GAP, TITLE_HEIGHT
from d2_distill.engine.setup import load_config
from d2_distill.teacher import teacher_config

from ..data.small_sets import write_coco, write_image
from ..small_detectors import SavedTeacher, build, detector_cfg, distiller_cfg

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import predict  # noqa: E402

CLASSES = ("cat", "dog", "cow")
WIDTH, HEIGHT = 64, 48
SCALE = 4  # by which such an image is enlarged for its labels to be read


def small(cfg, row=None):
    """For small images, and with the class names of a data set."""
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    if row is not None:
        cfg.DATASETS.COCO, cfg.DATASETS.TRAIN = (row,), (row[0],)
    return cfg


def save(folder: Path, name: str, case: str, salt: int, row=None) -> SavedTeacher:
    cfg = small(detector_cfg(case), row)
    (folder / f"{name}.yaml").write_text(cfg.dump())
    DetectionCheckpointer(build(cfg, salt=salt), str(folder)).save(name)
    return SavedTeacher(str(folder / f"{name}.yaml"), str(folder / f"{name}.pth"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Arguments of a distillation's config with the weights of its student; class names come from a data set."""
    folder = tmp_path_factory.mktemp("pair")
    row = write_coco(folder / "predict", classes=CLASSES)
    teacher, student = (save(folder, name, "RetinaNet", salt, row) for name, salt in (("teacher", 1), ("student", 3)))
    cfg = small(distiller_cfg("RetinaNet", teacher, ["PKD"]), row)
    (folder / "distilled.yaml").write_text(cfg.dump())
    return ["--config-file", str(folder / "distilled.yaml"), "MODEL.WEIGHTS", student.weights]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command and returns what it prints; the output folder is ``tmp_path / "out"``."""

    def run(*arguments):
        command = ["predict.py", *map(str, arguments), "--output", str(tmp_path / "out"), "--score-threshold", "0.2"]
        monkeypatch.setattr(sys, "argv", command)
        predict.main()
        return "".join(capsys.readouterr())

    return run


def predictors(pair):
    cfg = load_config(pair[1], pair[2:])
    return Predictor.from_config(cfg), Predictor.from_config(teacher_config(cfg))


def rows_of(folder: Path):
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def expected_rows(predictor, image, **where):
    found = predictor(image)
    found = found[found.scores >= 0.2]
    assert len(found)
    for (x0, y0, x1, y1), score, index in zip(
        found.pred_boxes.tensor.tolist(), found.scores.tolist(), found.pred_classes.tolist()
    ):
        box = pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        yield {**where, "category_id": index, "category": CLASSES[index], "bbox": box, "score": pytest.approx(score)}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def write_video(path: Path, frames: int, rate: float) -> Path:
    with VideoFile(path, rate) as video:
        for seed in range(frames):
            noise = np.random.RandomState(seed).randint(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
            video.write(noise.repeat(8, axis=0).repeat(8, axis=1))
    return path


def test_student_and_teacher_beside_each_other(pair, call, tmp_path):
    write_image(tmp_path / "a.png", WIDTH, HEIGHT, seed=1)
    call(*pair, "--input", tmp_path / "a.png", "--teacher", "--json")
    image = pixels(tmp_path / "a.png")
    student, teacher = predictors(pair)
    rows = [*expected_rows(student, image, model="student"), *expected_rows(teacher, image, model="teacher")]
    assert rows_of(tmp_path / "out") == [{"file_name": str(tmp_path / "a.png"), **row} for row in rows]

    picture = pixels(tmp_path / "out" / "a.png")
    assert picture.shape == (HEIGHT * SCALE + TITLE_HEIGHT, 2 * WIDTH * SCALE + GAP, 3)
    for predictor, left in ((student, 0), (teacher, WIDTH * SCALE + GAP)):
        found = predictor(image)
        drawn = draw_detections(image, found[found.scores >= 0.2], CLASSES)
        assert (picture[TITLE_HEIGHT:, left : left + WIDTH * SCALE] == drawn).all()


def test_a_folder_with_subfolders_and_other_files(pair, call, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jpg", "a.bmp", "deep/b.png"):
        write_image(folder / name, WIDTH, HEIGHT, seed=2)
    (folder / "notes.txt").write_text("no image")
    printed = call("--input", folder, *pair)  # keys and values also stand behind the inputs
    assert f"1 files are no images and left out, the first is {folder / 'notes.txt'}" in printed
    assert printed.count("3 of 3 images, ") == 1 and "images/s" in printed
    out = tmp_path / "out"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {"b.jpg", "a.bmp.jpg", "deep/b.png"}
    assert pixels(out / "b.jpg").shape == (HEIGHT * SCALE, WIDTH * SCALE, 3)


def test_a_video_keeps_its_frames_size_and_rate(pair, call, tmp_path):
    clip = write_video(tmp_path / "clip.avi.mp4", frames=7, rate=10)
    call(*pair, "--input", clip, "--json")
    with VideoSource(str(tmp_path / "out" / "clip.avi.mp4")) as video:
        frames = list(video.frames())
        assert video.rate == 10
    assert len(frames) == 7 and frames[0].shape == (HEIGHT * SCALE, WIDTH * SCALE, 3)
    rows = rows_of(tmp_path / "out")
    with VideoSource(str(clip)) as video:
        images = list(video.frames())
    student, _ = predictors(pair)
    expected = [expected_rows(student, image, frame=k, model="student") for k, image in enumerate(images)]
    assert rows == [{"file_name": str(clip), **row} for of_frame in expected for row in of_frame]


def test_some_frames_of_a_video(pair, call, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=9, rate=30)
    call(*pair, "--input", clip, "--every", 3, "--max-frames", 2, "--json")
    with VideoSource(str(tmp_path / "out" / "clip.mp4")) as video:
        assert (video.rate, len(list(video.frames()))) == (10, 2)  # it plays as fast as before
    assert {row["frame"] for row in rows_of(tmp_path / "out")} == {0, 3}


def test_any_detector_beside_it(pair, call, tmp_path):
    other = save(tmp_path, "other", "GFL", salt=2)
    write_image(tmp_path / "a.png", WIDTH, HEIGHT, seed=1)
    beside = ("--beside", other.config_file, "MODEL.WEIGHTS", other.weights)
    call(*pair, *beside, *beside, "--input", tmp_path / "a.png", "--json")
    assert pixels(tmp_path / "out" / "a.png").shape[1] == 3 * WIDTH * SCALE + 2 * GAP
    assert {row["model"] for row in rows_of(tmp_path / "out")} == {"student", "other 2", "other 3"}


def test_unreadable_files_are_named_and_the_rest_goes_on(pair, call, tmp_path, capsys):
    write_image(tmp_path / "b.png", WIDTH, HEIGHT, seed=1)
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    names = [tmp_path / name for name in ("a.png", "clip.mp4", "b.png")]
    with pytest.raises(SystemExit, match="error: 2 inputs could not be used: .*a.png, .*clip.mp4; the rest is in"):
        call(*pair, "--input", *names)
    errors = capsys.readouterr().err
    assert "left out: The image" in errors and "clip.mp4 cannot be read as a video" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


def test_odd_pictures_are_used_or_left_out_with_a_word(pair, call, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_image(folder / "low.png", 3000, 1, seed=1)
    write_image(folder / "thin.png", 1, 3000, seed=1)
    write_image(folder / "whole.png", WIDTH, HEIGHT, seed=1)
    gray = np.asarray(Image.open(folder / "whole.png").convert("L"))
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(gray.astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(gray).save(folder / "moving.gif", save_all=True, append_images=[Image.fromarray(255 - gray)])
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match="2 inputs could not be used: .*empty.jpg, .*float.tif; the rest is in"):
        call(*pair, "--input", folder, "--json")
    errors = capsys.readouterr().err
    assert "float.tif cannot be read (its pixels are floating-point" in errors and "Traceback" not in errors
    found = {name: [] for name in ("gray.png", "deep.png", "moving.gif")}
    for row in rows_of(tmp_path / "out"):
        found.get(Path(row.pop("file_name")).name, []).append(row)
    assert found["gray.png"] == found["deep.png"] == found["moving.gif"] != []
    assert {"low.png", "thin.png"} <= {path.name for path in (tmp_path / "out").rglob("*.png")}


def test_resume_does_what_is_left(pair, call, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        write_image(folder / name, WIDTH, HEIGHT, seed=ord(name[0]))
    call(*pair, "--input", folder, "--json")
    out, rows = tmp_path / "out", rows_of(tmp_path / "out")
    kept, whole = (out / "a.png").read_bytes(), (out / "detections.jsonl").read_text()
    (out / "a.png").write_bytes(b"as it was")
    (out / "b.png").unlink()  # as if the program had ended between the rows and the picture, or in the next row
    (out / "detections.jsonl").write_text(whole + '{"file_name": "half')
    printed = call(*pair, "--input", folder, "--json", "--resume")
    assert "2 of 3 inputs are done already" in printed and "1 of 1 images" in printed
    assert (out / "a.png").read_bytes() == b"as it was" and (out / "b.png").exists()
    assert sorted(map(json.dumps, rows_of(out))) == sorted(map(json.dumps, rows))
    call(*pair, "--input", folder, "--json")
    assert (out / "a.png").read_bytes() == kept and (out / "detections.jsonl").read_text() == whole
    (out / "detections.jsonl").write_text("[1]\n")
    with pytest.raises(SystemExit, match="detections.jsonl was not written by this tool"):
        call(*pair, "--input", folder, "--json", "--resume")


@pytest.fixture
def camera(monkeypatch, tmp_path):
    """A clip takes the place of the camera, of which the machine has none."""
    clip = write_video(tmp_path / "clip.mp4", frames=5, rate=10)
    monkeypatch.setattr(predict, "VideoSource", lambda source: VideoSource(str(clip)))


def test_a_camera_without_a_display_is_recorded(camera, pair, call, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "can_show", lambda: False)
    printed = call(*pair, "--input", "webcam:0", "--max-frames", 4, "--json")
    assert f"There is no display: webcam:0 is recorded to {tmp_path / 'out' / 'webcam-0.mp4'}" in printed
    with VideoSource(str(tmp_path / "out" / "webcam-0.mp4")) as video:
        assert video.rate == 10 and len(list(video.frames())) >= 1
    assert {row["frame"] for row in rows_of(tmp_path / "out")} == {0, 1, 2, 3}


def test_a_camera_is_shown_until_the_window_is_closed(camera, pair, call, tmp_path, monkeypatch):
    shown = []

    class ClosedAtTheThird(Window):
        def show(self, frame):
            shown.append(frame.shape)
            return len(shown) < 3

    monkeypatch.setattr(predict, "can_show", lambda: True)
    monkeypatch.setattr(predict, "Window", ClosedAtTheThird)
    call(*pair, "--input", "webcam:0", "--teacher")
    assert shown == [(HEIGHT * SCALE + TITLE_HEIGHT, 2 * WIDTH * SCALE + GAP, 3)] * 3
    assert not (tmp_path / "out" / "webcam-0.mp4").exists()


def test_no_camera_is_one_sentence(pair, call, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: 1 inputs could not be used: webcam:99"):
        call(*pair, "--input", "webcam:99")
    assert "left out: webcam:99 cannot be opened; connect a camera" in capsys.readouterr().err


@pytest.mark.parametrize(
    "inputs, message",
    [
        (("none.jpg",), "there is no file or folder none.jpg"),
        (("empty",), "the folder empty has no images"),
        (("a.png", "deep/a.png"), "a.png and deep/a.png would both be written to .*a.png"),
        (("out/a.png",), "out/a.png would be overwritten"),
    ],
)
def test_inputs_are_checked_before_anything_is_done(pair, call, tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "deep", "out"):
        Path(folder).mkdir()
    for name in ("a.png", "deep/a.png", "out/a.png"):
        write_image(Path(name), WIDTH, HEIGHT, seed=0)
    with pytest.raises(SystemExit, match=f"error: --(input|output): {message}"):
        call(*pair, "--input", *inputs)


def test_a_plain_config_has_no_teacher(pair, call, tmp_path):
    other = save(tmp_path, "other", "GFL", salt=2)
    write_image(tmp_path / "a.png", WIDTH, HEIGHT, seed=0)
    with pytest.raises(SystemExit, match="error: --teacher: .*other.yaml names no MODEL.DISTILL.TEACHER.CONFIG_FILE"):
        call("--config-file", other.config_file, "--teacher", "--input", tmp_path / "a.png")
    with pytest.raises(SystemExit, match="error: --beside .*other.yaml: MODEL.WEIGHTS is empty"):
        call(*pair, "--input", tmp_path / "a.png", "--beside", other.config_file)
