"""The command line of train_net.py."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from ..listing import print_choices, print_pair


def parse_arguments(epilog: str) -> argparse.Namespace:
    """Detectron2's options, and those of this project."""
    parser = default_argument_parser(epilog=epilog)
    parser.add_argument(
        "--list",
        action="store_true",
        help="print detectors, backbones, methods and which pairs they serve; with --config-file, of its pair; then end",
    )
    args = parser.parse_args()
    if args.list:
        args.num_gpus = args.num_machines = 1
    return args


def list_choices(args: argparse.Namespace) -> None:
    """What ``--list`` asks for.

    Raises:
        UserError: a config is not valid, or a detector that it describes cannot be built.
    """
    if not comm.is_main_process():
        return
    if args.config_file:
        print_pair(args.config_file, args.opts)
    else:
        print_choices(args.opts)
