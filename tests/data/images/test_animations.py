"""Frames of animated images: which count, and when they are shown."""

from __future__ import annotations

import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import frame_times, read_frames
from megavlm.data.records.record import MediaFile
from tests.data.images.test_video import shown, write_animation


def test_the_image_of_a_png_that_is_no_frame_is_left_out(tmp_path):
    pictures = [Image.new("RGB", (40, 30), (value,) * 3) for value in (250, 20, 120)]
    path = tmp_path / "a.png"
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], default_image=True, duration=[300, 100]
    )
    file = MediaFile(path=str(path))
    assert frame_times(file) == pytest.approx([0.0, 0.3])
    frames = read_frames(file, lambda times: [0, 1], Tiling(tile_size=16))
    assert [shown(frame.encoded) for frame in frames] == pytest.approx([20, 120], abs=3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_a_frame_without_a_duration_is_shown_for_a_tenth_of_a_second(tmp_path, kind):
    pictures = [Image.new("RGB", (40, 30), (value,) * 3) for value in (250, 20, 120)]
    path = tmp_path / f"a.{kind}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[0, 300, 0])
    assert frame_times(MediaFile(path=str(path))) == pytest.approx([0.0, 0.1, 0.4])


def test_a_gif_of_too_many_frames_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megavlm.data.images.video.MAX_FRAMES", 4)
    path = write_animation(tmp_path / "a.gif", 5)
    with pytest.raises(ValueError, match="more than 4 frames"):
        frame_times(MediaFile(path=str(path)))
