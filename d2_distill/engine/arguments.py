"""The command line of train_net.py."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from ..config.reading import split_overrides
from ..data.own_sets import add_data_arguments
from .listing import print_choices, print_pair
from .setup import load_config


def parse_arguments(epilog: str) -> argparse.Namespace:
    """Detectron2's arguments, the data sets to train and to evaluate on, and ``--list``."""
    parser = default_argument_parser(epilog=epilog)
    add_data_arguments(parser)
    parser.add_argument(
        "--teacher", nargs="+", default=[], metavar="RUN",
        help="distil: the folder of the teacher's run, or its config (or a name of Detectron2's model zoo) and weights; "
        "methods and weights are chosen for the pair unless the config names them",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print detectors, backbones, methods and which pairs they serve, or those of a --config-file",
    )
    args = parser.parse_args()
    args.teacher, opts = split_overrides(args.teacher)
    args.opts = [*opts, *args.opts]
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
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    if args.config_file:
        cfg = load_config(
            args.config_file, opts, train_data=args.train_data, test_data=args.test_data, teacher=args.teacher
        )
        print_pair(cfg, args.config_file)
    else:
        print_choices(load_config("", opts))
