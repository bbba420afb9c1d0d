"""What a sample is to be made smaller by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megavlm.config.tiling import VideoPixels
from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.images.frame_sampling import show_frames
from megavlm.data.images.native import usual_video_pixels
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import Frame, frames_as_images
from megavlm.data.packing.size_limits import SizeLimits
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    ("mode", "tiles", "frames", "text", "advice"),
    [
        ("dynamic", 13, 2, 10, " or lower --max_tiles"),
        ("dynamic", 1, 14, 10, " or lower --max_frames"),
        ("dynamic", 10, 20, 10, " or lower --max_tiles and --max_frames"),
        ("dynamic", 6, 6, 10, " or lower --max_tiles or --max_frames"),
        ("dynamic", 1, 14, 302, " or lower --max_frames"),  # with the lines of the frames
        ("dynamic", 3, 1, 900, ""),  # the text is too long
        ("pad", 1, 2, 900, ""),  # an image is one tile, however large
        ("anyres_max_9", 9, 2, 10, " or lower --grids"),
        ("anyres_max_9", 2, 1, 480, ""),  # the least that a grid makes
    ],
)
def test_the_advice_is_what_helps(
    mode: str, tiles: int, frames: int, text: int, advice: str
) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    template = ChatTemplate(tokenizer, 64)
    tiling = Tiling(tile_size=16, mode=mode)
    joined = tiling.joins_frames
    layout = feature_layout(mode, 64)
    columns = tiles - 1 if joined else tiles
    still = Image(
        encoded=b"", width=16 * columns, height=16, columns=columns, rows=1, tiles=tiles, name="a"
    )
    shown = [
        Image(
            encoded=b"",
            width=16,
            height=16,
            columns=1,
            rows=1,
            tiles=1,
            frames=frames - number if joined else 0,
            name="v",
        )
        for number in range(frames)
    ]
    images = (still, *shown)
    # A line of a frame has 17 tokens beside its features.
    length = sum(map(layout.count, images)) + text + (0 if joined else 17 * frames)
    limits = SizeLimits(
        capacity=600, tile_cap=None, tiling=tiling, layout=layout, template=template
    )
    with pytest.raises(RejectError) as caught:
        limits.check(length, images, ["v"])
    assert caught.value.reason == "too_long"
    assert caught.value.detail.partition("raise --capacity")[2] == advice, length
    if text == 10 and not joined:
        limits = SizeLimits(
            capacity=9999, tile_cap=9, tiling=tiling, layout=layout, template=template
        )
        with pytest.raises(RejectError) as caught:
            limits.check(length, images, ["v"])
        assert caught.value.detail.partition("raise --tile_cap")[2] == advice


def test_a_sample_may_fill_a_pack_and_no_video_is_asked_of_texts_that_have_none() -> None:
    """A pair is one image and its text."""
    words = load_tokenizer(GOLDEN / "tokenizer")
    image = Image(encoded=b"", width=16, height=16, columns=1, rows=1, tiles=1, name="a")
    limits = SizeLimits(
        capacity=8,
        tile_cap=2,
        tiling=Tiling(tile_size=16, mode="stretch"),
        layout=feature_layout("stretch", 0),
        template=ChatTemplate(words, 0, name="clip"),
    )
    limits.check(8, [image, image])
    with pytest.raises(RejectError, match="^too_long: 9 tokens, 0 of them for 1 tiles, .* holds 8"):
        limits.check(9, [image])
    with pytest.raises(RejectError, match="^too_many_tiles: 3 tiles of 3 images, .* holds 2"):
        limits.check(9, [image] * 3)


def _image(tiles: int, name: str) -> Image:
    return Image(
        encoded=b"", width=16 * tiles, height=16, columns=tiles, rows=1, tiles=tiles, name=name
    )


@pytest.mark.parametrize(
    ("mode", "images", "videos", "cap", "advice"),
    [
        # Each of two videos keeps a frame.
        ("dynamic", [(1, "v"), (1, "v"), (1, "w"), (1, "w")], ["v", "w"], 2, "--max_frames"),
        ("dynamic", [(1, "v"), (1, "v"), (1, "w"), (1, "w")], ["v", "w"], 1, ""),
        # Images that have one tile do not get smaller, and do not get larger.
        ("anyres", [(5, "a"), (1, "b"), (1, "c"), (1, "d")], [], 5, "--grids"),
        ("anyres", [(5, "a"), (1, "b"), (1, "c"), (1, "d")], [], 4, ""),
    ],
)
def test_the_advice_helps_to_the_last_tile(
    mode: str, images: list[tuple[int, str]], videos: list[str], cap: int, advice: str
) -> None:
    limits = SizeLimits(
        capacity=9999,
        tile_cap=cap,
        tiling=Tiling(tile_size=16, mode=mode),
        layout=feature_layout("dynamic", 64),
        template=ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), 64),
    )
    with pytest.raises(RejectError) as caught:
        limits.check(9, [_image(*image) for image in images], videos)
    told = caught.value.detail.partition("raise --tile_cap")[2]
    assert told == (f" or lower {advice}" if advice else "")


def _videos(
    videos: list[tuple[int, int, int]], still: int, bounds: VideoPixels, template: ChatTemplate
) -> tuple[SizeLimits, int, tuple[Image, ...]]:
    """Return limits of 1,024 tokens, and length and images of a question about videos of these
    widths, heights and numbers of frames, and an image of a row of so many tiles.
    """
    tiling = Tiling(tile_size=28, mode="native", video=bounds, max_pixels=10**6)
    layout = feature_layout("native", 1)
    with_times = template.format.times_frames
    shown: list[Image] = []
    times = []
    for number, (width, height, count) in enumerate(videos):
        frames = [
            Frame(encoded=b"", width=width, height=height, seconds=place / 2)
            for place in range(count)
        ]
        shown += frames_as_images(frames, f"v{number}", tiling, with_times=with_times)
        times.append([frame.seconds for frame in frames])
    question = "<video>" * len(videos)
    if still:
        picture = Image(
            encoded=b"", width=28 * still, height=28, columns=still, rows=1, tiles=still, name="a"
        )
        shown.append(picture)
        question += "<image>"
    turns = [Turn(role="human", text=question), Turn(role="gpt", text="a")]
    turns = show_frames(turns, times, joined=True, with_times=with_times)
    tokens, _ = template.encode(turns, *sizes_in_text(shown, layout))
    limits = SizeLimits(
        capacity=1024, tile_cap=None, tiling=tiling, layout=layout, template=template
    )
    return limits, len(tokens), tuple(shown)


def _lowered(flag: str, videos: list[tuple[int, int, int]], bounds: VideoPixels) -> dict:
    """Return videos and bounds with one option as low as it goes."""
    if flag == "--max_frames":
        return {"videos": [(width, height, 1) for width, height, _ in videos], "bounds": bounds}
    name = {"--video_total_pixels": "total", "--video_min_pixels": "least"}[flag]
    return {"videos": videos, "bounds": replace(bounds, **{name: 784})}


USUAL = usual_video_pixels(28, 1024)
LARGE = VideoPixels(least=784, most=768 * 784, total=10**8)


@pytest.mark.parametrize(
    ("videos", "still", "bounds", "advice", "with_times"),
    [
        # 128 tiles of each of 100 pairs, whose times alone are more than a pack.
        ([(1280, 720, 200)], 0, USUAL, "--max_frames or --video_min_pixels", "--max_frames"),
        ([(640, 360, 20)], 0, LARGE, "--max_frames or --video_total_pixels", None),
        # A single frame is larger than what the image leaves.
        ([(1280, 720, 700)], 320, LARGE, "--video_total_pixels", "--max_pixels and --max_frames"),
        ([(1280, 720, 4)], 900, USUAL, "--max_pixels", None),
        # So are two, of each video one.
        ([(1280, 720, 8), (500, 500, 6)], 0, LARGE, "--video_total_pixels", None),
        ([(1280, 720, 8)], 1030, LARGE, "--max_pixels and --video_total_pixels", None),
        ([(1280, 720, 2200)], 0, USUAL, "--max_frames", None),
    ],
)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_the_advice_about_videos_is_what_helps(
    name: str,
    videos: list[tuple[int, int, int]],
    still: int,
    bounds: VideoPixels,
    advice: str,
    with_times: str | None,
) -> None:
    if with_times and name == "qwen3_vl":
        advice = with_times
    words = load_tokenizer(GOLDEN / "tokenizer")
    add_special_tokens(words, "qwen2_vl")
    template = ChatTemplate(words, 1, name=name, system_message="")
    limits, length, images = _videos(videos, still, bounds, template)
    with pytest.raises(RejectError) as caught:
        limits.check(length, images, [f"v{number}" for number in range(len(videos))])
    told = caught.value.detail.partition("raise --capacity")[2]
    assert told == f" or lower {advice}"
    for flag in ("--max_frames", "--video_total_pixels", "--video_min_pixels"):
        lowered = _lowered(flag, videos, bounds)
        _, shorter, _ = _videos(**lowered, still=still, template=template)
        assert (shorter <= 1024) == (flag in told and " and " not in told), (flag, shorter)
