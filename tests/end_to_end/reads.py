"""recorder.py, each process of which lists the annotation files that it opens in $READS/<rank>.

``SPOIL=<file>:<file>`` overwrites these files when all processes have set the run up.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import recorder
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

import train_net
from d2_distill.engine import start


def main(args: Any) -> Any:
    sys.addaudithook(list_annotation_files)
    set_up = train_net.setup

    def set_up_and_spoil(args: Any) -> Any:
        result = set_up(args)
        comm.synchronize()
        if comm.is_main_process():
            for path in filter(None, os.environ.get("SPOIL", "").split(":")):
                with open(path, "w") as file:
                    file.write("{")
        comm.synchronize()
        return result

    train_net.setup = set_up_and_spoil
    return recorder.main(args)


def list_annotation_files(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith(("set.json", ".xml")) and "r" in (arguments[1] or ""):
        with open(os.path.join(os.environ["READS"], str(comm.get_rank())), "a") as file:
            file.write(f"{arguments[0]}\n")


if __name__ == "__main__":
    start(main, default_argument_parser().parse_args())
