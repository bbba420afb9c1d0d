"""Videos of any size in packs, from the command line of the packer: how large they become, what is
stored of them, and what the text says.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.config.tiling import VideoPixels
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.media import Images
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.films import BOUNDS, BY_NAME, FILMS, Film, chat, pack, samples_of, write_films


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"))


def grid_by_the_rule(film: Film, tile: int) -> tuple[int, int]:
    """Return columns and rows of tiles, as qwen-vl-utils resizes the frames of a video."""
    width, height = film.size
    count = len(film.chosen) + len(film.chosen) % 2
    most = max(min(BOUNDS["most"], BOUNDS["total"] / count * 2), int(BOUNDS["least"] * 1.05))
    columns, rows = (max(1, round(side / tile)) for side in (width, height))
    if columns * rows * tile**2 > most:
        shrink = math.sqrt(width * height / most)
        columns, rows = (max(1, int(side / shrink / tile)) for side in film.size)
    elif columns * rows * tile**2 < BOUNDS["least"]:
        grow = math.sqrt(BOUNDS["least"] / (width * height))
        columns, rows = (math.ceil(side * grow / tile) for side in film.size)
    return columns, rows


def seen(tiles: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * tiles}<|vision_end|>"


def told(film: Film, tile: int, timed: bool) -> str:
    """Return what the text has in the place of a video."""
    columns, rows = grid_by_the_rule(film, tile)
    firsts = film.times[::2]
    if not timed:
        return seen(columns * rows * len(firsts))
    pairs = zip(firsts, film.times[1::2] or firsts, strict=True)
    return "".join(f"<{(a + b) / 2:.1f} seconds>{seen(columns * rows)}" for a, b in pairs)


def check_frames(film: Film, images: list[tuple[np.void, bytes]], tile: int, timed: bool) -> None:
    """See that a video is stored as it should be."""
    columns, rows = grid_by_the_rule(film, tile)
    count = len(film.chosen)
    assert len(images) == count
    span = film.times[-1] - film.times[0]
    for number, (row, content) in enumerate(images):
        assert (row["width"], row["height"]) == film.size
        assert (row["columns"], row["rows"]) == (columns, rows)
        assert row["tiles"] == (0 if number % 2 else columns * rows)
        left = count - number
        assert row["frames"] == (min(left, 2 - number % 2) if timed else left)
        assert row["interval"] == pytest.approx(2 * span / (count - 1) if count > 1 else 0)
        picture = film.pictures[film.chosen[number]]
        stored = Image.open(io.BytesIO(content))
        if film.name == "folder":
            assert stored.format == "PNG" and stored.size == film.size
            continue
        assert stored.format == "JPEG" and stored.size == (columns * tile, rows * tile)
        expected = np.asarray(picture.resize(stored.size, Image.Resampling.BICUBIC), float)
        # A GIF has few colours; frames differ by more than a level.
        assert np.abs(np.asarray(stored, float) - expected).mean() < (
            4 if film.name[0] == "a" else 2
        )


@pytest.mark.parametrize(
    ("recipe", "tile", "timed"),
    [("qwen2_vl", 28, False), ("qwen2_5_vl", 28, False), ("qwen3_vl", 32, True)],
)
def test_videos_have_the_size_and_text_of_the_recipe(
    films: Path, tmp_path: Path, recipe: str, tile: int, timed: bool
) -> None:
    records = [chat(f"what\n<video>\nis {film.name}", video=film.name) for film in FILMS]
    names = ["folder", "a.gif", "short.mp4"]
    media = {"video": names, "image": ["still.png", "still.png"]}
    question = "<video><image>\n<video>then\n<image><video>"
    records += [chat(question, **media), chat("<video>", video="long.mp4", clip=[2.0, 3.05])]
    packs = pack(films, tmp_path / "packs", records, recipe=recipe)
    manifest = packs.manifest
    assert vars(manifest.video) == BOUNDS and manifest.rejects == {}
    assert manifest.template == ("qwen3_vl" if timed else "qwen2_vl")
    found = {sample.line: sample for sample in samples_of(packs)}
    assert len(found) == len(records)
    start = "<|im_start|>user\n"
    answer = "<|im_end|>\n<|im_start|>assistant\nit moves<|im_end|>\n"
    for line, film in enumerate(FILMS, 1):
        check_frames(film, found[line].images, tile, timed)
        place = f"what{told(film, tile, timed)}is {film.name}"
        assert found[line].text == f"{start}{place}{answer}"
    mixed = found[len(FILMS) + 1]
    lengths = [len(BY_NAME[name].chosen) for name in names]
    ends = np.cumsum([lengths[0], 1, lengths[1], 1, lengths[2]])
    for name, first, end in zip(names, [0, *ends[[1, 3]]], ends[[0, 2, 4]], strict=True):
        check_frames(BY_NAME[name], mixed.images[first:end], tile, timed)
    still = seen(mixed.images[ends[0]][0]["tiles"])
    folder, gif, short = (told(BY_NAME[name], tile, timed) for name in names)
    assert mixed.text == f"{start}{folder}{still}{gif}then{still}{short}{answer}"
    assert mixed.images[ends[0]][0]["frames"] == mixed.images[ends[0]][0]["interval"] == 0
    clip = found[len(records)]
    check_frames(
        Film(name="long.mp4", size=(32, 36), frames=103, chosen=[20, 23, 26, 29]),
        clip.images,
        tile,
        timed,
    )


@pytest.mark.parametrize("template", ["qwen2_vl", "qwen3_vl"])
def test_headers_say_what_is_written(films: Path, template: str) -> None:
    words = load_tokenizer(films / "words")
    tiling = Tiling(tile_size=28, mode="native", video=VideoPixels(**BOUNDS))
    choice = FrameChoice(min_frames=1, max_frames=20, multiple=2, sampling="fps2")
    encoder = Encoder(ChatTemplate(words, 1, name=template), tiling, 640, frames=choice)
    for film in FILMS:
        raw = RawRecord(offset=0, number=3, content=chat("<video>", video=str(films / film.name)))
        how = dict(annotations=Annotations(name="a", path="a.jsonl"), source=0)
        (whole,) = encoder.encode_raw(raw, images=Images.LOAD, **how)
        bare = tuple(replace(image, encoded=b"") for image in whole.images)
        assert all(image.encoded for image in whole.images)
        for images in (Images.HEADER, Images.DECODE):
            (size,) = encoder.measure_raw(raw, images=images, **how)
            assert (size.length, size.tiles) == (whole.length, whole.tiles), film.name
            assert size.images == bare, film.name
