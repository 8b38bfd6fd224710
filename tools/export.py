#!/usr/bin/env python3
"""Exports a trained student: weights alone, a TorchScript file or an ONNX file; compares and evaluates such files.

    python tools/export.py checkpoint output/distilled/model_final.pth student.pth --half
    python tools/export.py onnx --config-file output/distilled/config.yaml --output student.onnx \\
        MODEL.WEIGHTS output/distilled/model_final.pth
    python tools/export.py torchscript --config-file ... --output student.pt MODEL.WEIGHTS ...
    python tools/export.py evaluate --config-file ... student.onnx

A distillation's config exports its plain student; no teacher is built. More in docs/shipping.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  before detectron2: chooses which one is imported

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.whole_files import require_free, whole_file
from d2_distill.apps.export.checkpoint import read_checkpoint, to_half, write_checkpoint
from d2_distill.apps.export.description import describe_model
from d2_distill.apps.export.graphs import build_graph
from d2_distill.apps.export.runtime import SUFFIXES, ExportedDetector, load_exported, padded
from d2_distill.apps.export.verification import Comparison, compare_outputs, milliseconds
from d2_distill.apps.export.writers import require_onnx, write_onnx, write_torchscript
from d2_distill.data.augmentation import build_augmentation
from d2_distill.data.checks import check_dataset
from d2_distill.data.pictures import read_image
from d2_distill.data.registration import register_datasets
from d2_distill.engine.evaluate import evaluate, load_detector
from d2_distill.engine.setup import load_config
from d2_distill.engine.trainer import Trainer
from d2_distill.errors import UserError, reported
from d2_distill.evaluation.speed import synthetic_batch
from d2_distill.evaluation.voc import voc_convention

CHECKPOINT = """Strip a checkpoint of train_net.py to the student's weights. The file is called
OUTPUT-<first 8 digits of its sha256>.pth, and loads as MODEL.WEIGHTS of the plain student."""
GRAPH = """Export the detector of a config with MODEL.WEIGHTS. The graph takes an image of 0 to 255, normalises and pads
it, and gives boxes in its pixels, scores and classes; with --raw the head's outputs. The file is kept only if it agrees
with the detector on images: those of --image, else the first of DATASETS.TEST, or noise with --noise; and on pieces of
the first, as other sizes."""
EVALUATE = """Evaluate an exported file, with post-processing, on DATASETS.TEST of a config, as train_net.py --eval-only
evaluates the detector."""
# Of noise; the first is what the graph is traced with.
NOISE_SIZES = ((200, 256), (256, 200), (97, 131))


def export_checkpoint(args: argparse.Namespace) -> None:
    if args.output.suffix != ".pth":
        raise UserError(f"{args.output} must end with .pth, by which Detectron2 knows the format.")
    content = read_checkpoint(args.checkpoint)
    state = content.pop("model")
    target = write_checkpoint(to_half(state) if args.half else state, args.output)
    print(f"Read  {args.checkpoint}: {_megabytes(args.checkpoint)}")
    print(f"Wrote {target}: {_megabytes(target)}{', half precision' if args.half else ''}")
    print(f"Left out: {', '.join(sorted(content)) or 'nothing'}")


def export_graph(args: argparse.Namespace) -> None:
    suffix = next(suffix for suffix, name in SUFFIXES.items() if name == args.format)
    if args.output.suffix != suffix:
        raise UserError(f"{args.output} must end with {suffix}.")
    require_free(args.output, overwrite=args.overwrite, option="--output")
    if args.format == "onnx":
        require_onnx()
    fixed_size = tuple(args.fixed_size) if getattr(args, "fixed_size", None) else None
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    model = load_detector(cfg)
    graph = build_graph(model, cfg.TEST.NMS, raw=args.raw)
    description = describe_model(cfg, model, graph.output_names, raw=args.raw, fixed_size=fixed_size)
    images = [padded(image, description) for image in test_images(cfg, args, fixed_size)]
    if fixed_size is None:
        images += crops(images[0])
    with whole_file(args.output) as path:
        if args.format == "onnx":
            write_onnx(graph, images[0], description, path, fixed_size=fixed_size)
        else:
            write_torchscript(graph, images[0], description, path)
        exported = load_exported(path)
        comparisons = compare_outputs(graph, exported, images)
        medians = milliseconds(graph, exported, images[0], args.rounds)
        report(comparisons, medians, len(images), images[0].shape[-2:])
        if not all(comparison.accepted for comparison in comparisons):
            raise UserError(f"{args.output} was not written: it differs from the detector; see the table above.")
    print(f"Wrote {args.output}: {_megabytes(args.output)}")


def report(comparisons: Sequence[Comparison], medians: dict, num_images: int, size: Sequence[int]) -> None:
    """Print what was compared, and times."""
    rows = [
        [c.name, c.number, f"{c.difference:.2g}", f"{c.relative:.2g}", c.remark, "yes" if c.accepted else "NO"]
        for c in comparisons
    ]
    headers = [f"{num_images} images", "number", "largest difference", "relative", "", "accepted"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    if not any(c.number for c in comparisons):
        print("Nothing was detected, so nothing was compared; name pictures with objects by --image.")
    print(
        "Median time on {} x {}, {} threads: eager {:.1f} ms, exported {:.1f} ms".format(
            *size, torch.get_num_threads(), medians["eager"], medians["exported"]
        )
    )


def test_images(cfg: CfgNode, args: argparse.Namespace, fixed_size: Sequence[int] | None) -> list[torch.Tensor]:
    """Images (1, 3, H, W) uint8 to trace and to compare with, resized as for an evaluation."""
    if args.image:
        return [read_resized(cfg, path) for path in args.image]
    if args.noise:
        sizes = [fixed_size] if fixed_size else NOISE_SIZES
        return [synthetic_batch(1, *size, num_classes=1)[0]["image"][None] for size in sizes]
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name pictures to compare with by --image, or take --noise.")
    name = cfg.DATASETS.TEST[0]
    register_datasets(cfg)
    check_dataset(name, key="DATASETS.TEST", strict=False)
    batches = islice(Trainer.build_test_loader(cfg, name), args.images)
    return [x["image"][None] for batch in batches for x in batch]


def crops(image: torch.Tensor) -> list[torch.Tensor]:
    """A flat and a narrow piece: a data set may have images of one size only, and hide that the graph keeps it."""
    height, width = image.shape[-2:]
    return [image[..., : -(-height // 2), :].contiguous(), image[..., : -(-width // 2)].contiguous()]


def read_resized(cfg: CfgNode, path: str) -> torch.Tensor:
    try:
        image = read_image(path, format=cfg.INPUT.FORMAT)
    except Exception as error:  # whatever the decoder raises
        raise UserError(f"--image {path} cannot be read as an image ({error}); name a picture.") from error
    resized = T.AugInput(image)
    T.AugmentationList(build_augmentation(cfg, is_train=False))(resized)
    return torch.from_numpy(resized.image.transpose(2, 0, 1).copy())[None]


def evaluate_file(args: argparse.Namespace) -> None:
    exported = load_exported(args.file)
    if not exported.description["post_processing"]:
        raise UserError(f"{args.file} has raw outputs; only detections can be evaluated, export without --raw.")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    voc_convention(cfg.TEST.VOC_CONVENTION)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name the data set to evaluate on.")
    register_datasets(cfg)
    for name in cfg.DATASETS.TEST:
        check_dataset(name, key="DATASETS.TEST", strict=False)
    setup_logger(name="d2_distill")
    setup_logger()
    evaluate(cfg, ExportedDetector(exported))


def _megabytes(path) -> str:
    return f"{os.path.getsize(path) / 1e6:.2f} MB"


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="checkpoint|torchscript|onnx|evaluate")

    checkpoint = commands.add_parser("checkpoint", description=CHECKPOINT, help="the student's weights alone")
    checkpoint.set_defaults(command=export_checkpoint)
    checkpoint.add_argument("checkpoint", help="checkpoint of train_net.py (.pth)")
    checkpoint.add_argument("output", type=Path, help="file to write (.pth); its hash is put into its name")
    checkpoint.add_argument("--half", action="store_true", help="half precision; loaded, it is float32 again")

    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config-file", required=True, metavar="FILE")
    config.add_argument("--threads", type=whole_number(1), default=torch.get_num_threads())

    graph = argparse.ArgumentParser(add_help=False)
    graph.set_defaults(command=export_graph)
    graph.add_argument("--output", type=Path, required=True, metavar="FILE")
    graph.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    graph.add_argument("--raw", action="store_true", help="the head's outputs instead of detections")
    images = graph.add_mutually_exclusive_group()
    images.add_argument("--image", action="append", metavar="FILE", help="a picture to compare on; may be repeated")
    images.add_argument("--noise", action="store_true", help="compare on noise")
    graph.add_argument(
        "--images", type=whole_number(1), default=8, metavar="N", help="images of DATASETS.TEST (default: 8)"
    )
    graph.add_argument("--rounds", type=whole_number(1), default=10, metavar="N", help="timed runs (default: 10)")

    torchscript = commands.add_parser(
        "torchscript", description=GRAPH, parents=[config, graph], help="a file for torch.jit.load (.pt)")
    torchscript.set_defaults(format="torchscript")
    onnx = commands.add_parser("onnx", description=GRAPH, parents=[config, graph], help="an ONNX file (.onnx)")
    onnx.set_defaults(format="onnx")
    onnx.add_argument(
        "--fixed-size", type=whole_number(1), nargs=2, metavar=("H", "W"), help="of all images; default: any size"
    )

    evaluation = commands.add_parser("evaluate", description=EVALUATE, parents=[config], help="AP of a file")
    evaluation.set_defaults(command=evaluate_file)
    evaluation.add_argument("file", type=Path, help="written by this tool (.pt, .onnx)")
    for command in (torchscript, onnx, evaluation):
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values, behind all options")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with reported():
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        args.command(args)


if __name__ == "__main__":
    main()
