"""Frames through OpenCV: what is written can be read, files are closed by any end, cameras keep their time."""

from __future__ import annotations

import numpy as np
import pytest

from d2_distill.apps.inference import video
from d2_distill.apps.inference.video import LiveRecording, VideoFile, VideoSource, can_show
from d2_distill.errors import UserError

pytest.importorskip("cv2")


def frame(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Red of a brightness."""
    return np.stack([np.full((height, width), channel, np.uint8) for channel in (value, 0, 0)], axis=-1)


def write(path, frames, rate=12.5):
    with VideoFile(path, rate) as file:
        for each in frames:
            file.write(each)
    return path


def reds(source, every: int = 1):
    return [int(each[20, 20, 0]) for each in source.frames(every)]


def test_frames_rate_and_length_come_back(tmp_path):
    path = write(tmp_path / "clip.mp4", [frame(20 * k) for k in range(10)])
    with VideoSource(str(path)) as source:
        assert (source.rate, source.length) == (12.5, 10)
        assert reds(source) == pytest.approx([20 * k for k in range(10)], abs=8)
    with VideoSource(str(path)) as source:
        assert reds(source, every=4) == pytest.approx([0, 80, 160], abs=8)


def test_odd_sides_are_padded(tmp_path):
    path = write(tmp_path / "clip.mp4", [frame(200, 41, 63)] * 2)
    with VideoSource(str(path)) as source:
        [first, _] = source.frames()
    assert first.shape == (42, 64, 3)
    assert first[:40, :60].mean(axis=(0, 1)) == pytest.approx((200, 0, 0), abs=8) and first[41].mean() < 40


def test_a_failure_leaves_a_video_that_plays(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoFile(tmp_path / "clip.mp4", 10) as file:
        for _ in range(5):
            file.write(frame(100))
        raise KeyboardInterrupt
    with VideoSource(str(tmp_path / "clip.mp4")) as source:
        assert len(reds(source)) == 5


def test_a_recording_plays_as_fast_as_the_world(tmp_path, monkeypatch):
    moments = iter([10.0, 10.0625, 10.125, 10.5, 11.0])
    monkeypatch.setattr(video.time, "monotonic", lambda: next(moments))
    with LiveRecording(tmp_path / "live.mp4", rate=8) as file:
        counts = []
        for value in (0, 50, 100, 150, 200):
            file.record(frame(value))
            counts.append(file.written)
    assert counts == [1, 1, 2, 5, 9]  # a frame that comes too early for the rate is left out


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="text.mp4 cannot be read as a video; restore the file"):
        VideoSource(str(tmp_path / "text.mp4"))
    with pytest.raises(UserError, match="webcam:99 cannot be opened; connect a camera"):
        VideoSource(99)
    with pytest.raises(UserError, match="missing.*clip.mp4 cannot be written as a video"):
        write(tmp_path / "missing" / "clip.mp4", [frame(0)])


def test_no_display_is_noticed(monkeypatch):
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(video.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert not can_show()
    monkeypatch.setenv("DISPLAY", ":987")  # named, but not there
    assert not can_show()
