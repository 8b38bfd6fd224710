#!/usr/bin/env python3
"""Draws what a detector finds in images, folders, videos or a camera, beside its teacher or any other detector.

    python tools/predict.py --config-file output/distilled/config.yaml MODEL.WEIGHTS output/distilled/model_final.pth \\
        --input photo.jpg photos/ clip.mp4 --teacher --output output/predictions --json
    python tools/predict.py --config-file ... MODEL.WEIGHTS ... --input webcam:0

The config of a distillation gives its plain student; a teacher is built with --teacher only. Pictures keep the names
and subfolders of the images, videos become .mp4. A camera is shown in a window where there is a display (q closes it),
else recorded. After Ctrl-C pictures that were written stay, a video plays as far as it got, and --resume goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  before detectron2: chooses which one is imported

# isort: split
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from PIL import Image

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.whole_files import partial_path, whole_file
from d2_distill.apps.command_line.progress import StepProgress
from d2_distill.apps.inference.predictor import Predictor
from d2_distill.apps.inference.video import LiveRecording, VideoFile, VideoSource, Window, can_show
from d2_distill.apps.pictures import draw_detections, name_of, side_by_side, write_picture
from d2_distill.config.reading import split_overrides
from d2_distill.data.pictures import read_image
from d2_distill.detectors.building import DISTILLER
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError, reported
from d2_distill.teacher import teacher_config

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
PICTURE_SUFFIXES = {".jpeg", ".jpg", ".png"}  # of what is written; other images become .jpg
CAMERA = re.compile(r"webcam:(\d+)")
JSON_FILE = "detections.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """An image, a video or a camera, and the file that its picture or video goes to.

    Attributes:
        name: path of the file, or "webcam:N".
    """

    name: str
    target: Path

    @property
    def camera(self) -> int | None:
        match = CAMERA.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def is_image(self) -> bool:
        return self.camera is None and Path(self.name).suffix.lower() not in VIDEO_SUFFIXES


def find_sources(inputs: Sequence[str], output: Path) -> list[Source]:
    """The images, videos and cameras that inputs name, in their order; folders are searched, sorted by name.

    Raises:
        UserError: an input does not exist, or two of them, or an input and its picture, would be one file.
    """
    sources = []
    for text in inputs:
        if CAMERA.fullmatch(text):
            sources.append(Source(text, output / f"{text.replace(':', '-')}.mp4"))
            continue
        paths = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not paths:
            raise UserError(
                f"--input: there is no file or folder {text}; correct the path, or write a camera as webcam:0."
            )
        for path in map(Path, paths):
            if path.is_dir():
                sources += _images_below(path, output)
            else:
                sources.append(Source(str(path), output / _target_name(path)))
    _require_own_targets(sources)
    return sources


def _images_below(folder: Path, output: Path) -> list[Source]:
    written = output.resolve()
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and written not in path.resolve().parents
    )
    known = Image.registered_extensions()
    images = [path for path in files if path.suffix.lower() in known]
    if len(images) < len(files):
        other = next(path for path in files if path.suffix.lower() not in known)
        print(f"{folder}: {len(files) - len(images)} files are no images and left out, the first is {other}.")
    if not images:
        raise UserError(f"--input: the folder {folder} has no images; name another.")
    return [Source(str(path), output / _target_name(path, path.relative_to(folder))) for path in images]


def _target_name(path: Path, relative: Path | None = None) -> Path:
    relative = relative or Path(path.name)
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return relative.with_suffix(".mp4")
    return relative if suffix in PICTURE_SUFFIXES else relative.with_name(f"{relative.name}.jpg")


def _require_own_targets(sources: Sequence[Source]) -> None:
    targets: dict[Path, Source] = {}
    for source in sources:
        other = targets.setdefault(source.target, source)
        if other is not source:
            raise UserError(
                f"--input: {other.name} and {source.name} would both be written to {source.target}; name one of them "
                "in a second command with another --output."
            )
        if source.target.exists() and source.camera is None and source.target.samefile(source.name):
            raise UserError(f"--output: {source.name} would be overwritten; name another folder.")


class Detectors:
    """One detector or several beside each other.

    Args:
        predictors: title -> detector.
        threshold: lowest score of what is drawn and listed.
    """

    def __init__(self, predictors: dict[str, Predictor], threshold: float) -> None:
        self.predictors = predictors
        self.threshold = threshold

    def look(self, image: np.ndarray, **where: Any) -> tuple[np.ndarray, list[Row]]:
        """An RGB picture of what each finds in an RGB image, and a row for each detection, with ``where`` in front."""
        pictures, rows = [], []
        for title, predictor in self.predictors.items():
            found = predictor(image)
            found = found[found.scores >= self.threshold]
            pictures.append(draw_detections(image, found, predictor.class_names))
            rows += [{**where, "model": title, **row} for row in _rows(found, predictor.class_names)]
        return side_by_side(pictures, list(self.predictors)), rows


def _rows(found: Instances, class_names: Sequence[str]) -> Iterator[Row]:
    boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    for box, score, index in zip(boxes.tolist(), found.scores.tolist(), found.pred_classes.tolist()):
        yield {"category_id": index, "category": name_of(index, class_names), "bbox": box, "score": score}


class JsonLines:
    """A file of rows, each written at once.

    Args:
        keep: names of files whose rows in an existing file stay.

    Raises:
        UserError: the existing file is another's.
    """

    def __init__(self, path: Path, keep: Sequence[str]) -> None:
        kept, wanted = [], set(keep)
        if wanted and path.exists():
            # Of a row that was being written when the program was killed there is no end of the line.
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            try:
                kept = [line for line in lines if json.loads(line)["file_name"] in wanted]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path} was not written by this tool; remove it, or name another folder by --output."
                ) from None
        with whole_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self.path = path

    def write(self, rows: Sequence[Row]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))


@dataclass
class Job:
    """What is done with each source."""

    detectors: Detectors
    rows: JsonLines | None
    every: int
    max_frames: int | None
    images: StepProgress

    def run(self, source: Source) -> None:
        """
        Raises:
            UserError: the source cannot be read.
        """
        source.target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_image:
            self._image(source)
        elif source.camera is None:
            self._video(source)
        else:
            self._camera(source)

    def _look(self, image: np.ndarray, source: Source, **where: int) -> np.ndarray:
        picture, rows = self.detectors.look(image, file_name=source.name, **where)
        if self.rows is not None:
            self.rows.write(rows)
        return picture

    def _image(self, source: Source) -> None:
        try:
            image = read_image(source.name, "RGB")
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError ...
            raise UserError(f"The image {source.name} cannot be read ({error}).") from error
        write_picture(self._look(image, source), source.target)
        self.images.step()

    def _video(self, source: Source) -> None:
        partial = partial_path(source.target)
        with VideoSource(source.name) as video, VideoFile(partial, video.rate / self.every) as written:
            length = None if video.length is None else -(-video.length // self.every)
            if self.max_frames is not None:
                length = min(self.max_frames, length or self.max_frames)
            progress = StepProgress(f"frames of {source.name}", length)
            for number, frame in enumerate(islice(video.frames(self.every), self.max_frames)):
                written.write(self._look(frame, source, frame=number * self.every))
                progress.step()
        if not progress.done:
            raise UserError(f"The video {source.name} has no frame that can be read.")
        os.replace(partial, source.target)
        progress.report()

    def _camera(self, source: Source) -> None:
        progress = StepProgress(f"frames of {source.name}", self.max_frames)
        with contextlib.ExitStack() as stack:
            camera = stack.enter_context(VideoSource(source.camera))
            window = stack.enter_context(Window("d2_distill, q closes")) if can_show() else None
            recording = None
            if window is None:
                print(f"There is no display: {source.name} is recorded to {source.target} until Ctrl-C.", flush=True)
                recording = stack.enter_context(LiveRecording(source.target, camera.rate))
            for number, frame in enumerate(islice(camera.frames(self.every), self.max_frames)):
                picture = self._look(frame, source, frame=number * self.every)
                progress.step()
                if recording is not None:
                    recording.record(picture)
                elif not window.show(picture):
                    break
        progress.report()


def build_predictors(args: argparse.Namespace) -> dict[str, Predictor]:
    """Title -> detector, in the order of their columns.

    Raises:
        UserError: a config or checkpoint cannot be used, or the config has no teacher.
    """
    cfg = load_config(args.config_file, args.opts)
    titled: list[tuple[str, CfgNode, str]] = [(_title(args.config_file, cfg), cfg, "MODEL.WEIGHTS")]
    if args.teacher:
        if not cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
            raise UserError(
                f"--teacher: {args.config_file} names no MODEL.DISTILL.TEACHER.CONFIG_FILE; name the second detector "
                "by --beside CONFIG MODEL.WEIGHTS CHECKPOINT."
            )
        titled.append(("teacher", teacher_config(cfg), "MODEL.DISTILL.TEACHER.WEIGHTS"))
    for config_file, *opts in args.beside:
        other = load_config(config_file, opts)
        titled.append((_title(config_file, other), other, f"--beside {config_file}: MODEL.WEIGHTS"))
    counts = Counter(title for title, _, _ in titled)
    predictors: dict[str, Predictor] = {}
    for title, each, key in titled:
        name = title if counts[title] == 1 else f"{title} {len(predictors) + 1}"
        predictors[name] = Predictor.from_config(each, weights_key=key)
    return predictors


def _title(config_file: str, cfg: CfgNode) -> str:
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        return "student"
    path = Path(config_file)
    return path.parent.name if path.stem == "config" else path.stem


def predict(args: argparse.Namespace) -> list[str]:
    """Do all of the work.

    Returns:
        The inputs that could not be used.
    """
    sources = find_sources(args.input, args.output)
    done = {source for source in sources if args.resume and source.camera is None and source.target.exists()}
    if done:
        print(f"{len(done)} of {len(sources)} inputs are done already.")
    detectors = Detectors(build_predictors(args), args.score_threshold)
    rows = JsonLines(args.output / JSON_FILE, [source.name for source in done]) if args.json else None
    left = [source for source in sources if source not in done]
    images = StepProgress("images", sum(source.is_image for source in left))
    job = Job(detectors, rows, args.every, args.max_frames, images)
    failed = []
    for source in left:
        try:
            job.run(source)
        except UserError as error:
            failed.append(source.name)
            print(f"left out: {error}", file=sys.stderr, flush=True)
    if images.done:
        images.report()
    return failed


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="INPUT",
        help="image, folder (with its subfolders), glob in quotes, video, or webcam:NUMBER",
    )
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder (default: %(default)s)")
    parser.add_argument("--teacher", action="store_true", help="the teacher that the config names, beside its student")
    parser.add_argument(
        "--beside", nargs="+", action="append", default=[], metavar=("CONFIG", "KEY VALUE"),
        help="any other detector beside it: config file, and keys such as MODEL.WEIGHTS; may be repeated",
    )
    parser.add_argument("--score-threshold", type=float, default=0.5, help="lowest score (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help=f"also write {JSON_FILE}: a line for each detection, in COCO's result form"
    )
    parser.add_argument("--resume", action="store_true", help="leave out inputs whose picture or video is there")
    parser.add_argument("--every", type=whole_number(1), default=1, metavar="N", help="of a video, take every N-th frame")
    parser.add_argument("--max-frames", type=whole_number(1), metavar="N", help="of a video or camera, take N frames at most")
    parser.add_argument("opts", nargs="*", help="config keys and values")
    args = parser.parse_args()
    args.input, opts = split_overrides(args.input)
    args.opts += opts
    if not args.input:
        parser.error("--input names nothing")
    return args


def main() -> None:
    args = parse_args()
    with reported():
        try:
            failed = predict(args)
        except KeyboardInterrupt:
            print(f"Stopped; what is finished lies in {args.output}, and --resume goes on.", file=sys.stderr)
            raise
    if failed:
        sys.exit(f"error: {len(failed)} inputs could not be used: {', '.join(failed)}; the rest is in {args.output}.")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
