"""The command line of train_net.py."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser

from ..data.own_sets import add_data_arguments


def argument_parser(epilog: str) -> argparse.ArgumentParser:
    """Detectron2's arguments, and the data sets to train and to evaluate on."""
    parser = default_argument_parser(epilog=epilog)
    add_data_arguments(parser)
    return parser
