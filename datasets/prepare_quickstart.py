"""Makes the quick-start data set: handwritten digits on photographs, in COCO format, without a download."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.quickstart import prepare
from d2_distill.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python datasets/prepare_quickstart.py --root /data --train-images 5000",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")),
        help="folder that gets quickstart/ (default: $DETECTRON2_DATASETS, else datasets)",
    )
    parser.add_argument("--train-images", type=int, default=1800, help="default: %(default)s")
    parser.add_argument("--val-images", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=96, help="of a scene, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with reported():
        folder = prepare(
            args.root,
            train_images=args.train_images,
            val_images=args.val_images,
            size=args.size,
            seed=args.seed,
        )
    print(f"Quick-start data: {folder}")


if __name__ == "__main__":
    main()
