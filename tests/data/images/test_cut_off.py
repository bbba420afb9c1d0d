"""Videos and animations that were cut off are refused, and those that are whole are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.cut_off import check_whole
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import frame_times, read_frames
from megavlm.data.records.record import MediaFile
from tests.data.images.test_video import write_animation, write_video


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "mpeg4", {}),
        ("a.webm", "libvpx", {}),
        ("a.mp4", "mpeg4", {"movflags": "faststart"}),
        ("a.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mov", "mpeg4", {}),
        ("a.avi", "mpeg4", {}),
        ("a.gif", "", {}),
        ("a.webp", "", {}),
        ("a.png", "", {}),
    ],
    ids=lambda value: "".join(value.values()) if isinstance(value, dict) else value,
)
def test_a_file_that_was_cut_off_is_refused(tmp_path, name, codec, options):
    path = tmp_path / name
    whole = write_video(path, 40, codec, **options) if codec else write_animation(path, 40)
    content = whole.read_bytes()
    assert len(frame_times(MediaFile(path=name, content=content))) == 40
    for share in (0.3, 0.6, 0.9):
        file = MediaFile(path=name, content=content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=r"cut off|truncated|decoder object|cannot be read"):
            frame_times(file)
        with pytest.raises(ValueError, match=r"cut off|truncated|decoder object|cannot be read"):
            read_frames(file, lambda times: [0], Tiling(tile_size=16))
    # Nobody misses what stands behind the end.
    assert len(frame_times(MediaFile(path=name, content=content + bytes(100)))) == 40


@pytest.mark.parametrize("size", [0, 2**31 - 1, 2**32 - 1])
def test_avi_that_was_written_into_a_pipe_is_read(tmp_path, size):
    content = bytearray(write_video(tmp_path / "a.avi", 40).read_bytes())
    content[4:8] = size.to_bytes(4, "little")
    assert len(frame_times(MediaFile(path="a.avi", content=bytes(content)))) == 40


def test_a_video_that_does_not_say_how_long_it_is_gives_the_frames_it_has(tmp_path):
    streamed = write_video(tmp_path / "a.mkv", 40, live="1").read_bytes()
    assert len(frame_times(MediaFile(path="a.mkv", content=streamed))) == 40
    half = streamed[: len(streamed) // 2]
    assert 10 < len(frame_times(MediaFile(path="a.mkv", content=half))) < 30


def box(name: bytes, size: int) -> bytes:
    return (8 + size).to_bytes(4) + name + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        box(b"free", 40) + b"\0\0\0\1mdat" + (116).to_bytes(8) + bytes(100),
        box(b"skip", 40) + box(b"ftyp", 40) + box(b"mdat", 100),
        box(b"ftyp", 40) + box(b"moof", 100),
        b"RIFF\x0f\0\0\0AVI " + bytes(12) + b"RIFF\x70\0\0\0AVIX" + bytes(108),
    ],
    ids=["sizes of 64 bits", "room in front", "a fragment", "parts of odd sizes"],
)
def test_unusual_parts_are_counted(content):
    check_whole(io.BytesIO(content))
    with pytest.raises(ValueError, match="cut off: it has"):
        check_whole(io.BytesIO(content[:-20]))


def test_avi_that_counts_its_head_is_read():
    content = b"RIFF\x78\0\0\0AVI " + bytes(108)
    assert len(content) == 0x78
    check_whole(io.BytesIO(content))


def test_a_gif_without_the_mark_of_its_end_is_read(tmp_path):
    content = write_animation(tmp_path / "a.gif", 5).read_bytes()
    frames = read_frames(MediaFile(path="a.gif", content=content), range_of, Tiling(tile_size=16))
    last = content.rindex(b"!\xf9")  # where what is said of the last frame begins
    tried = dict.fromkeys(range(last - 5, len(content) - 1), False) | dict.fromkeys(
        [last, len(content) - 1], True
    )
    for size, is_whole in tried.items():
        file = MediaFile(path="a.gif", content=content[:size])
        if is_whole:
            found = read_frames(file, range_of, Tiling(tile_size=16))
            assert found == frames[: 4 if size == last else 5]
        else:
            with pytest.raises(ValueError, match="cut off|cannot be read"):
                frame_times(file)
    # Colours of a frame's own, and a comment at the end.
    first, second = (Image.fromarray(np.full((4, 4, 3), each, np.uint8)) for each in (9, 99))
    first.save(tmp_path / "b.gif", save_all=True, append_images=[second], comment="c" * 300)
    content = (tmp_path / "b.gif").read_bytes()[:-1]
    assert len(frame_times(MediaFile(path="b.gif", content=content))) == 2


def range_of(times):
    return range(len(times))
