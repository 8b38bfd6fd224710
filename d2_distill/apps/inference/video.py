"""Frames of videos and cameras, read and written with OpenCV, as RGB arrays (H, W, 3) uint8."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError

CODEC = "mp4v"
USUAL_RATE = 25.0  # frames a second of a source that does not tell


def opencv() -> Any:
    """The module, whose own messages are held back.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise UserError("Videos and cameras are read with OpenCV; run `pip install opencv-python`.") from None
    return cv2


class VideoSource:
    """The frames of a video file or a camera, one after the other.

    Attributes:
        rate: frames a second.
        length: number of frames as the file states it; None if unknown.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, source: str | int) -> None:
        cv2 = opencv()
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            if isinstance(source, int):
                raise UserError(
                    f"webcam:{source} cannot be opened; connect a camera, close other programs that use it, or name "
                    "another by its number."
                )
            raise UserError(f"{source} cannot be read as a video; restore the file or convert it to .mp4.")
        self._to_rgb = cv2.COLOR_BGR2RGB
        rate, length = (self._capture.get(what) for what in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.rate = rate if math.isfinite(rate) and rate > 0 else USUAL_RATE
        self.length: int | None = int(length) if math.isfinite(length) and length > 0 else None

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.release()

    def frames(self, every: int = 1) -> Iterator[np.ndarray]:
        """Every ``every``-th frame from the first on; frames between are not decoded."""
        cv2 = opencv()
        while self._capture.grab():
            found, frame = self._capture.retrieve()
            if not found:
                return
            yield cv2.cvtColor(frame, self._to_rgb)
            for _ in range(every - 1):
                if not self._capture.grab():
                    return


class VideoFile:
    """Writes frames of one size to an .mp4 file; closed by any end of a ``with`` block, so that it plays.

    The file is opened at the first frame; an odd side is padded by a line of black, which the codec asks for.

    Args:
        path: the folder must exist.
        rate: frames a second.

    Raises:
        UserError: OpenCV cannot write such a file.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = rate
        self.written = 0
        self._writer = None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, frame: np.ndarray, times: int = 1) -> None:
        """Append a frame, ``times`` over."""
        cv2 = opencv()
        height, width = frame.shape[:2]
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)))
        if self._writer is None:
            size = frame.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter_fourcc(*CODEC), self.rate, size)
            if not self._writer.isOpened():
                raise UserError(
                    f"{self.path} cannot be written as a video with the codec {CODEC}; install an opencv-python that "
                    "was built with FFmpeg, and look whether the folder can be written to."
                )
        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        for _ in range(times):
            self._writer.write(bgr)
        self.written += times


class LiveRecording(VideoFile):
    """A video of a camera that plays as fast as the world went: frames that come late are shown for longer."""

    def __init__(self, path: Path, rate: float) -> None:
        super().__init__(path, rate)
        self._start: float | None = None

    def record(self, frame: np.ndarray) -> None:
        """Append the frame of this moment as often as it takes."""
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        due = int((now - self._start) * self.rate) + 1
        self.write(frame, max(due - self.written, 0))


class Window:
    """A window that shows frames until q, Esc or its own button closes it."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *error: Any) -> None:
        opencv().destroyAllWindows()

    def show(self, frame: np.ndarray) -> bool:
        """Show a frame; False once the user has closed the window."""
        cv2 = opencv()
        cv2.imshow(self.title, np.ascontiguousarray(frame[:, :, ::-1]))
        if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
            return False
        return cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1


def can_show() -> bool:
    """Whether there is a display, and an OpenCV that can open windows on it."""
    if sys.platform not in ("win32", "darwin") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return False
    # In a process of its own: Qt ends the whole program where the display does not answer.
    trial = "import cv2; cv2.namedWindow('trial'); cv2.destroyAllWindows()"
    return subprocess.run([sys.executable, "-c", trial], capture_output=True, check=False).returncode == 0
