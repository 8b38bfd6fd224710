"""Runs the programs as from a command line, each in a fork of this process, so that nothing is imported again."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: exit status; negative for a signal.
        output: what it wrote to stdout and stderr.
    """

    status: int
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    @property
    def errors(self) -> list[str]:
        """Lines that report an error."""
        return [line for line in self.output.splitlines() if line.startswith("error: ") or ": error: " in line]


def call(program: str, *arguments: str, folder: Path, ending: Callable[[], Any] = lambda: None) -> Ended:
    """Run a program of the project, such as "tools/predict.py", with a working directory.

    Args:
        ending: called in the process of the program at its end.
    """
    log = folder / ".output"
    process = os.fork()
    if process == 0:
        status = _child(program, [str(word) for word in arguments], folder, log)
        ending()
        os._exit(status)
    _, status = os.waitpid(process, 0)
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return Ended(os.waitstatus_to_exitcode(status), output)


def _child(program: str, arguments: list[str], folder: Path, log: Path) -> int:
    target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(target, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    status = 1
    try:
        os.chdir(folder)
        sys.argv = [program, *arguments]
        spec = importlib.util.spec_from_file_location("__main__", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        sys.modules["__main__"] = module
        spec.loader.exec_module(module)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status
