"""Frames of videos, GIFs and folders: that they are the right pictures, and make samples."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megavlm.config.vision import RESAMPLES
from megavlm.data.images.decode import cut_tiles
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.transforms import centre_crop, to_square
from megavlm.data.images.video import Enough, frame_times, read_frames
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.media import Images
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.record import MediaFile
from megavlm.data.records.reject import Reject
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
RATE = 10


def level(place: int) -> int:
    """How bright frame ``place`` is."""
    return 10 + 5 * place


def write_video(
    path: Path, frames: int, codec: str = "mpeg4", b_frames: int = 0, **options: str
) -> Path:
    """Write a video of grey frames, each brighter than the one before, with a key frame every 6;
    ``options`` are those of the container.
    """
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 6
        stream.max_b_frames = b_frames
        if b_frames:
            stream.bit_rate = 2_000_000  # or their brightness is that of others
        for place in range(frames):
            pixels = np.full((48, 64, 3), level(place % 40), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_animation(path: Path, frames: int) -> Path:
    pictures = [Image.new("RGB", (40, 30), (level(place),) * 3) for place in range(frames)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, **lossless)
    return path


def write_folder(path: Path, frames: int) -> Path:
    path.mkdir()
    for place in range(frames):
        Image.new("RGB", (40, 30), (level(place),) * 3).save(path / f"frame_{place}.png")
    (path / "notes.txt").touch()
    (path / "._frame_0.png").touch()
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        "mp4": write_video(folder / "a.mp4", 40),
        "mkv": write_video(folder / "a.mkv", 40),
        "gif": write_animation(folder / "a.gif", 40),
        "webp": write_animation(folder / "a.webp", 40),
        "png": write_animation(folder / "a.png", 40),
        "folder": write_folder(folder / "frames", 40),
    }


def shown(encoded: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(encoded)).convert("L")).mean())


@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif", "webp", "png", "folder"])
def test_frames_are_the_ones_that_were_asked_for(videos, kind):
    file = MediaFile(path=str(videos[kind]))
    times = frame_times(file)
    assert times == pytest.approx(
        [place * (1.0 if kind == "folder" else 0.1) for place in range(40)], abs=1e-3
    )
    places = [0, 5, 6, 7, 20, 33, 39]
    frames = read_frames(file, lambda found: places, Tiling(tile_size=16))
    assert [shown(frame.encoded) for frame in frames] == pytest.approx(
        [level(place) for place in places], abs=3
    )
    assert {(frame.width, frame.height) for frame in frames} == {
        (64, 48) if kind in ("mp4", "mkv") else (40, 30)
    }
    sizes = {Image.open(io.BytesIO(frame.encoded)).size for frame in frames}
    assert sizes == {(40, 30) if kind == "folder" else (16, 16)}
    if kind != "folder":
        inside = MediaFile(path="x", content=videos[kind].read_bytes())
        assert read_frames(inside, lambda found: places, Tiling(tile_size=16)) == frames


@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif", "folder"])
def test_frames_are_counted_without_reading_all_of_a_video(videos, kind):
    file = MediaFile(path=str(videos[kind]))
    times = frame_times(file)
    for enough in (Enough(frames=4), Enough(frames=7), Enough(frames=2, seconds=1.1)):
        found = frame_times(file, enough)
        assert found == times[: len(found)] and len(found) > enough.frames
        assert found[-1] >= enough.seconds
        assert len(found) <= 18 or not kind.startswith("m")
    assert frame_times(file, Enough(frames=90)) == times


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_that_are_shown_before_the_key_frame_before_them_are_counted(tmp_path, name):
    # This encoder's groups are open.
    path = write_video(tmp_path / name, 40, "mpeg2video", b_frames=2)
    file = MediaFile(path=str(path))
    times = frame_times(file)
    for end in np.arange(0.35, 3, 0.1):
        found = frame_times(file, Enough(frames=2, seconds=float(end)))
        assert [time for time in found if time < end] == [time for time in times if time < end]
    assert len(frame_times(file, Enough(frames=2, seconds=0.35))) < 20


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.avi", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mpg", "mpeg2video"),
        ("a.ts", "mpeg2video"),
        ("a.ts", "libx264"),
        ("a.flv", "libx264"),
        ("a.asf", "mpeg4"),
        ("a.wmv", "libx264"),
    ],
)
def test_frames_that_are_stored_in_another_order_are_found_without_an_index(tmp_path, name, codec):
    """AVI does not say when they are shown, and in MPEG's streams one cannot go to a frame."""
    path = write_video(tmp_path / name, 40, codec, b_frames=2)
    file = MediaFile(path=str(path))
    assert frame_times(file) == pytest.approx([place * 0.1 for place in range(40)], abs=1e-3)
    for places in ([39], [13], [1, 2, 3, 20, 33, 38]):
        frames = read_frames(file, lambda found, places=places: places, Tiling(tile_size=16))
        assert [shown(frame.encoded) for frame in frames] == pytest.approx(
            [level(place) for place in places], abs=2.4
        )


def test_frames_are_found_if_some_have_one_time_stamp(tmp_path):
    path = write_video(tmp_path / "a.mpg", 200, "mpeg2video", b_frames=2)
    file = MediaFile(path=str(path))
    count = len(frame_times(file))
    assert 190 < count < 200
    [frame] = read_frames(file, lambda times: [count - 1], Tiling(tile_size=16))
    assert shown(frame.encoded) == pytest.approx(level(39), abs=2.4)


def test_a_folder_is_listed_once(tmp_path):
    folder = write_folder(tmp_path / "frames", 5)

    def choose(times):
        (folder / "frame_2.png").unlink()
        return [0, len(times) - 1]

    first, last = read_frames(MediaFile(path=str(folder)), choose, Tiling(tile_size=16))
    assert [shown(first.encoded), shown(last.encoded)] == [level(0), level(4)]
    (folder / "frame_2.png").touch()
    with pytest.raises(FileNotFoundError):
        read_frames(
            MediaFile(path=str(folder)), lambda times: choose(times) and [2], Tiling(tile_size=16)
        )


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_frames_are_resized_as_images_are(tmp_path, mode):
    pixels = np.random.default_rng(5).integers(0, 256, (2, 90, 70), np.uint8)
    first, second = map(Image.fromarray, pixels)
    first.save(tmp_path / "noise.gif", save_all=True, append_images=[second])
    shown = np.repeat(pixels[0][..., None], 3, axis=-1)
    for resample in RESAMPLES:
        tiling = Tiling(tile_size=16, mode=mode, resample=resample)
        file = MediaFile(path=str(tmp_path / "noise.gif"))
        [frame] = read_frames(file, lambda times: [0], tiling)
        image = Image.fromarray(shown)
        wholes = {
            "stretch": image,
            "crop": centre_crop(image, 16, resample),
            "pad": to_square(image, (124, 116, 104)),
        }
        whole = np.asarray(wholes[mode])
        [tile] = cut_tiles(whole, 1, 1, 16, False, resample=resample)
        found = np.asarray(Image.open(io.BytesIO(frame.encoded))).transpose(2, 0, 1)
        assert np.abs(found.astype(int) - tile).mean() < 2


def encode(
    path: Path,
    *,
    images=Images.LOAD,
    seed: int = 0,
    line: int = 4,
    capacity: int = 4000,
    tile_cap: int | None = None,
    **fields,
):
    template = ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), features_per_tile=4)
    encoder = Encoder(
        template, Tiling(tile_size=16), capacity, tile_cap, frames=FrameChoice(), seed=seed
    )
    chat = [{"from": "human", "value": "<video>\nwhat"}, {"from": "gpt", "value": "a film"}]
    content = {"video": str(path), "conversations": chat, **fields}
    entry = RawRecord(offset=0, number=line, content=content)
    annotations = Annotations(name="a", path="a.jsonl")
    found = encoder.encode_raw(entry, annotations, source=1, images=images)
    return found if isinstance(found, Reject) else found[0]


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder"])
def test_a_sample_with_a_video(videos, kind):
    sample = encode(videos[kind])
    count = len(sample.images)
    assert 8 <= count <= 32 and sample.tiles == count
    assert np.count_nonzero(sample.tokens == 5) == 4 * count
    assert {(image.columns, image.rows, image.tiles) for image in sample.images} == {(1, 1, 1)}
    levels = [shown(image.encoded) for image in sample.images]
    assert levels == sorted(levels) and levels[-1] - levels[0] > 100
    for images in (Images.HEADER, Images.DECODE):
        measured = encode(videos[kind], images=images)
        assert np.array_equal(measured.tokens, sample.tokens) and measured.images[0].encoded == b""
    assert encode(videos[kind]).images == sample.images
    assert any(encode(videos[kind], seed=seed).images != sample.images for seed in (1, 2))
    assert any(encode(videos[kind], line=line).images != sample.images for line in (5, 6))


def test_videos_that_cannot_be_samples(videos, tmp_path):
    (tmp_path / "a.mp4").write_bytes(videos["mp4"].read_bytes())
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "cut.mp4").write_bytes(videos["mp4"].read_bytes()[:600])
    (tmp_path / "playlist.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{videos['mp4']}\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare.mp4").touch()
    (tmp_path / "folders" / "1.png").mkdir(parents=True)
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "1.png")
    cases = [
        ("text.mp4", {}, "unreadable_video", "not a video that can be read"),
        ("cut.mp4", {}, "unreadable_video", "not a video that can be read"),
        ("playlist.mp4", {}, "unreadable_video", "not a video that can be read"),
        ("list.mp4", {}, "unreadable_video", "not a video that can be read"),
        ("nowhere.mp4", {}, "missing_video", "No such file"),
        ("empty", {}, "unreadable_video", "it has no frames"),
        ("bare.mp4", {}, "unreadable_video", "the file is empty"),
        ("folders", {}, "missing_video", "folders: 1.png: a directory, not a file"),
        ("pipes", {}, "missing_video", "pipes: 1.png: a pipe or a device, not a file"),
        (videos["mp4"], {"clip": [90, 99]}, "unreadable_video", "no frame between 90 and 99 s"),
        (videos["mp4"], {"tile_cap": 7}, "too_many_tiles", "lower --max_frames"),
        (videos["mp4"], {"capacity": 200}, "too_long", "lower --max_frames"),
    ]
    for name, fields, reason, words in cases:
        outcome = encode(tmp_path / name, **fields)
        assert (
            isinstance(outcome, Reject) and outcome.reason == reason and words in outcome.detail
        ), (name, outcome)


def test_a_video_of_too_many_or_too_large_frames_is_refused(videos, monkeypatch):
    file = MediaFile(path=str(videos["mp4"]))
    with monkeypatch.context() as patch:
        patch.setattr("megavlm.data.images.container.MAX_PIXELS", 64 * 48 - 1)
        with pytest.raises(ValueError, match="frames of 64 x 48 pixels; at most 3071"):
            read_frames(file, lambda times: [0], Tiling(tile_size=16))
    monkeypatch.setattr("megavlm.data.images.container.MAX_FRAMES", 39)
    with pytest.raises(ValueError, match="more than 39 frames"):
        frame_times(file)


def test_a_video_that_is_damaged_inside_is_refused(videos, tmp_path):
    data = bytearray(videos["mkv"].read_bytes())
    data[len(data) // 4 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 4)
    path = tmp_path / "damaged.mkv"
    path.write_bytes(data)
    outcome = encode(path)
    assert (isinstance(outcome, Reject) and outcome.reason == "unreadable_video") or len(
        outcome.images
    ) <= 32


def test_without_pyav_videos_are_refused_and_gifs_are_not(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'megavlm[video]'" in encode(videos["mp4"]).detail
    assert len(encode(videos["gif"]).images) >= 8
