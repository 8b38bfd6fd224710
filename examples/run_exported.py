#!/usr/bin/env python3
"""Runs an exported detector on pictures, and draws what it finds; needs neither d2_distill nor Detectron2.

    python examples/run_exported.py student.onnx photo.jpg more/*.jpg --output drawn/

A .onnx file needs numpy, Pillow and onnxruntime; a .pt file numpy, Pillow, torch and torchvision. The file itself says
how pictures are resized, in which order their channels are, and what the classes are called.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def load_onnx(path):
    """The model as a function of an image (1, 3, H, W) uint8, and its description."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    description = {name: json.loads(value) for name, value in properties.items()}
    return lambda image: session.run(None, {"image": image}), description


def load_torchscript(path):
    """The same of a TorchScript file."""
    warnings.simplefilter("ignore", FutureWarning)  # of newer torch: that TorchScript is old
    import torch
    import torchvision  # noqa: F401  brings the operators nms and roi_align

    files = {"metadata.json": ""}
    model = torch.jit.load(path, _extra_files=files)

    @torch.no_grad()
    def run(image):
        return [output.numpy() for output in model(torch.from_numpy(image))]

    return run, json.loads(files["metadata.json"])


def prepare(picture, description):
    """An RGB picture as the model wants it, (1, 3, H, W) uint8, and its size behind resizing, (height, width)."""
    width, height = picture.size
    scale = 1.0
    if description["min_size_test"]:  # 0: pictures keep their size
        scale = description["min_size_test"] / min(width, height)
        scale = min(scale, description["max_size_test"] / max(width, height))
    if description["fixed_size"]:
        scale = min(scale, description["fixed_size"][0] / height, description["fixed_size"][1] / width)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    if size != picture.size:
        picture = picture.resize(size, Image.BILINEAR)
    pixels = np.asarray(picture)
    if description["channel_order"] == "BGR":
        pixels = pixels[:, :, ::-1]
    if description["fixed_size"]:
        canvas = np.empty((*description["fixed_size"], 3), np.uint8)
        canvas[:] = description["pad_value"]
        canvas[: size[1], : size[0]] = pixels
        pixels = canvas
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None], (size[1], size[0])


def detect(run, description, picture):
    """Boxes (M, 4) XYXY in pixels of the picture, scores (M,) and classes (M,), best first."""
    image, (height, width) = prepare(picture, description)
    boxes, scores, classes = run(image)
    boxes = boxes * np.tile(np.float32([picture.width / width, picture.height / height]), 2)
    boxes = boxes.clip(0, np.float32([picture.width, picture.height] * 2))
    return boxes, scores, classes


def draw(picture, boxes, labels):
    picture = picture.copy()
    canvas = ImageDraw.Draw(picture)
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels):
        canvas.rectangle((left, top, right, bottom), outline="red", width=2)
        canvas.text((left + 3, top + 2), label, fill="red")
    return picture


def read(path: str) -> Image.Image:
    """Open a picture upright, in RGB; one of 16 bits is scaled, as Pillow would cut it off at 255."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I;"):
        picture = Image.fromarray(((np.asarray(picture).astype(np.int64) + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=".onnx or .pt file of tools/export.py, with detections")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for drawn pictures")
    parser.add_argument("--min-score", type=float, default=0.5, help="of what is shown (default: 0.5)")
    args = parser.parse_args()

    try:
        run, description = (load_onnx if args.model.endswith(".onnx") else load_torchscript)(args.model)
    except Exception as error:  # each runtime has errors of its own
        reason = str(error).splitlines()[0].partition(". ")[0]
        sys.exit(f"error: {args.model} cannot be loaded ({reason}); name a file of tools/export.py.")
    if not description["post_processing"]:
        sys.exit("error: the model has raw outputs; this example needs one that was exported without --raw.")
    try:
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output: {args.output} cannot be made a folder ({error.strerror}); name another.")
    names = description["class_names"]
    for path in args.pictures:
        try:
            picture = read(path)
        except OSError as error:
            sys.exit(f"error: {path} is no picture that can be read ({error}); leave it out.")
        boxes, scores, classes = detect(run, description, picture)
        shown = scores >= args.min_score
        labels = []
        for box, score, index in zip(boxes[shown], scores[shown], classes[shown]):
            labels.append(f"{names[index] if names else index} {score:.2f}")
            print(f"{path}: {labels[-1]} at " + " ".join(f"{value:.1f}" for value in box))
        if not labels:
            print(f"{path}: nothing that scores {args.min_score} or more")
        if args.output:
            draw(picture, boxes[shown], labels).save(args.output / (Path(path).stem + ".png"))


if __name__ == "__main__":
    main()
