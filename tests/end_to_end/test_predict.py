"""tools/predict.py as a program: a distilled run's own files are all it needs, and Ctrl-C loses nothing."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from d2_distill.apps.inference.video import VideoFile, VideoSource

from .runs import ROOT

pytest.importorskip("cv2")
TOOL = ROOT / "tools" / "predict.py"


def frames_of(path: Path) -> list:
    """The frames that rows are of."""
    return sorted({json.loads(line)["frame"] for line in path.read_text().splitlines()})


def test_an_interrupted_video_plays_and_is_done_again(server, distilled, tmp_path):
    out = tmp_path / "out"
    with VideoFile(tmp_path / "clip.mp4", 25) as video:
        for number in range(1000):
            video.write(np.full((40, 48, 3), number % 256, np.uint8))
    arguments = ["--config-file", distilled.folder / "config.yaml", "MODEL.WEIGHTS", distilled.weights]
    arguments += ["--input", tmp_path / "clip.mp4", "--output", out, "--teacher", "--json", "--score-threshold", 0]

    [started] = server.start(*arguments, script=TOOL)
    deadline, rows = time.monotonic() + 60, out / "detections.jsonl"
    while not (rows.exists() and '"frame": 4' in rows.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.signal(started, signal.SIGINT)
    outcome = server.wait([started])
    assert outcome.code == 130 and f"Stopped; what is finished lies in {out}" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert {path.name for path in out.iterdir()} == {"clip.partial.mp4", "detections.jsonl"}
    with VideoSource(str(out / "clip.partial.mp4")) as video:
        assert 3 < len(list(video.frames())) < 1000

    server.run(*arguments, "--resume", "--max-frames", 5, script=TOOL).succeeded()
    assert {path.name for path in out.iterdir()} == {"clip.mp4", "detections.jsonl"}
    assert frames_of(rows) == [0, 1, 2, 3, 4]
    again = server.run(*arguments, "--resume", script=TOOL).succeeded()
    assert "1 of 1 inputs are done already." in again.stdout
