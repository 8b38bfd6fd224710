"""Runs scripts as ``python script.py ...`` does, each in a process of its own, but imports torch only once.

Started by the tests as a process; takes requests and gives answers as lines of JSON. A script is run in a
fork of this process, which has imported what ``train_net.py`` imports and nothing more.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import sys
import time
import traceback

import torch

import d2_distill.engine  # noqa: F401  what takes long


def serve() -> dict | None:
    """Answer requests until the end of the input; returns, in the forked process only, the script to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "kill" in request:
            send = os.killpg if request["group"] else os.kill
            answer = send(request["kill"], request["signal"])
        elif "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if not answer:
                return request
            with contextlib.suppress(OSError):  # also here, so that no request comes before it
                os.setpgid(answer, answer)
        print(json.dumps(answer), flush=True)
    return None


def _wait(pid: int, timeout: float) -> int:
    """Status as a shell gives it; a process that takes too long is killed with all of its group."""
    deadline = time.monotonic() + timeout
    found, status = os.waitpid(pid, os.WNOHANG)
    while not found:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
        found, status = os.waitpid(pid, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def become(request: dict) -> None:
    """Take over the standard streams, folder, environment and arguments that the request names."""
    os.setpgid(0, 0)
    # As in a terminal: where the tests run in the background, their shell has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.flush()
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))


def run(argv: list) -> int:
    """The status with which ``python *argv`` would exit, after its exit functions have run."""
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = serve()
    if script:
        become(script)
        os._exit(run(script["argv"]))  # freeing all that was imported would take a second
