"""Starts the processes of a run, or joins those that torchrun started; reports the first error among them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.distributed.distributed_c10d import _get_default_store
from torch.multiprocessing import ProcessExitedException

from ..errors import FORBIDDEN, FULL, UserError, sentence_of
from .logs import close_log_files


def start(main: Callable[[Any], Any], args: Any) -> None:
    """Run ``main(args)`` in the number of processes asked for; a user's error gives a sentence and status 1.

    Under torchrun the processes exist already, and ``--num-gpus`` and ``--num-machines`` are not read.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        _report(main, args)
        dist.destroy_process_group()
    elif args.num_gpus * args.num_machines <= 1:
        _report(main, args)
    else:
        _launch(main, args)


def _join_torchrun() -> None:
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if use_cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def _launch(main: Callable[[Any], Any], args: Any) -> None:
    # After an error in one process torch would warn, at length, of the others that lose or are lost.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _signals_passed_on():
            launch(
                _report, args.num_gpus, num_machines=args.num_machines, machine_rank=args.machine_rank,
                dist_url=args.dist_url, args=(main, args),
            )
    except ProcessExitedException as error:  # the process has said why
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Lets the processes of the run end by themselves when this one, which only waits for them, is to end."""

    def pass_on(number: int, frame: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(main: Callable[[Any], Any], args: Any) -> None:
    """Run a process's part; of those that fail only the first says why, the others fail because of it."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_needless_traceback)
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        is_first = _count_failures(1) == 1
        if _is_users(error):
            close_log_files()
            if is_first:
                print(f"error: {sentence_of(error)}", file=sys.stderr, flush=True)
        elif is_first:
            raise
        sys.exit(1)


def _is_users(error: BaseException | None) -> bool:
    """Return whether an error is the user's to fix: a UserError, or a file that cannot be written."""
    return isinstance(error, UserError) or isinstance(error, OSError) and error.errno in (*FULL, *FORBIDDEN)


def _without_needless_traceback(record: logging.LogRecord) -> bool:
    """Filter for the logger of Detectron2's training loop, which logs every exception with its traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, OSError) and _is_users(error):
        return False  # the log itself may lie there
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = f"{record.getMessage()} {error}", (), None
        return True
    # The trainer turns a loss that is not finite into a user's error.
    return error is None or not (isinstance(error, FloatingPointError) or _count_failures(0))


def _count_failures(more: int) -> int:
    """Number of processes of the run that have failed, after ``more`` are added."""
    if not dist.is_initialized():
        return more
    try:
        return _get_default_store().add("d2_distill/failures", more)
    except RuntimeError:  # the store went with the process that failed
        return more + 1
