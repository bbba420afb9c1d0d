"""Images as the whole and a grid of tiles, in packs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from megavlm.config.recipes.llava_next import VICUNA_7B
from megavlm.data.images import anyres, decode
from megavlm.data.images.feature_layout import (
    MIXED,
    NEWLINE,
    as_tiled,
    feature_layout,
    numbers_in_pack,
)
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rank_slice import RankSlice
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import pack_dataset
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert.round_trip import golden_words
from tests.data.images.test_anyres import resize_along_rows_first

SIZES = [(50, 20), (15, 40), (31, 31), (64, 45), (90, 4)]
GRIDS = ((1, 1), (3, 2), (2, 2), (1, 3))
OPTIONS = ["--template", "llava_v1", "--tiling", "anyres", "--image_size", "28"]
OPTIONS += ["--patch_size", "7", "--grids", anyres.grids_text(GRIDS)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    golden_words(tmp_path / "words", "llava")
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shown = [f"{number}.png"] if number else ["0.png", "1.png"]
        turns = [
            {"from": "human", "value": "<image>" * len(shown) + f"\nwhich is number {number}"},
            {"from": "gpt", "value": f"it is {number}"},
        ]
        lines.append(json.dumps({"image": shown, "conversations": turns}))
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return tmp_path


def pack(data: Path, *options: str) -> PackedDataset:
    files = ["--jsonl", str(data / "records.jsonl"), "--root", str(data), "--workers", "0"]
    files += ["--tokenizer", str(data / "words"), "--out", str(data / "packs")]
    args = parse([*files, *OPTIONS, "--capacity", "1024", "--alignment", "4", *options])
    pack_dataset(make_job(args, VICUNA_7B))
    return PackedDataset(data / "packs")


def test_packs_have_the_tokens_and_tiles_of_their_images(data: Path) -> None:
    packs = pack(data)
    manifest = packs.manifest
    assert (manifest.tiling, manifest.grids) == ("anyres", GRIDS)
    assert (manifest.image_size, manifest.features_per_tile) == (28, 16)
    layout = feature_layout("anyres", 16)
    tiling = Tiling(tile_size=28, mode="anyres", grids=GRIDS)
    assert manifest.totals.images == 6 and len(packs) == 1
    stored = packs.reader.read(0)
    batch = packs.batch(0, 0)
    numbers = numbers_in_pack(stored.images, layout, 16)
    shown = batch.tokens == manifest.context_token_id
    assert int(shown.sum()) == len(numbers)
    rows = torch.full(shown.shape, NEWLINE - 1)
    rows[batch.feature_positions] = batch.feature_numbers
    rows[batch.newline_positions] = NEWLINE
    assert rows[shown].tolist() == numbers.tolist() and not (rows[~shown] >= NEWLINE).any()
    first = 0
    for index, row in enumerate(stored.images):
        size = int(row["width"]), int(row["height"])
        grid = tiling.grid(*size)
        assert (row["columns"], row["rows"]) == grid
        pixels = decode.decode_pixels(stored.image(index))
        expected = decode.cut_fitted(pixels, *grid, 28, anyres.fitted_size(*size, grid, 28))
        assert np.array_equal(batch.tiles[first : first + len(expected)].numpy(), expected)
        first += len(expected)
    assert first == len(batch.tiles) == manifest.totals.tiles
    assert manifest.totals.tokens == int(stored.lengths.sum())


def test_packs_have_the_tiles_of_llava_onevision(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize_along_rows_first(monkeypatch)
    packs = pack(data, "--tiling", "anyres_max_9", "--pixels", "siglip")
    manifest = packs.manifest
    assert (manifest.tiling, manifest.grids) == ("anyres_max_9", GRIDS)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_mean=[0.5] * 3,
        image_grid_pinpoints=[[28 * rows, 28 * columns] for columns, rows in GRIDS],
        do_rescale=False,
        do_normalize=False,
        do_pad=False,
    )
    batch = packs.batch(0, 0)
    stored = packs.reader.read(0)
    first = 0
    for sample in range(len(stored.lengths)):
        places = np.flatnonzero(stored.images["sample"] == sample)
        shown = [decode.decode_pixels(stored.image(place)) for place in places]
        expected = processor(images=[[Image.fromarray(pixels) for pixels in shown]])["pixel_values"]
        for place, tiles in zip(places, expected, strict=True):
            assert len(tiles) == stored.images["tiles"][place]
            found = batch.tiles[first : first + len(tiles)].numpy()
            assert np.array_equal(found, tiles), (sample, place)
            first += len(tiles)
        if len(places) > 1:
            layout = feature_layout("anyres_max_9", 16)
            assert (stored.images["tiles"][places] == 1).all()
            numbers = numbers_in_pack(stored.images[places], layout, 16)
            assert numbers.tolist() == [*range(16), NEWLINE, *range(16, 32), NEWLINE]
    assert first == len(batch.tiles)


@pytest.fixture
def videos(data: Path) -> Path:
    """Write records of a question and a folder, and of a GIF, an image and a folder: a question and
    a text.
    """
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (9, 40, 70), np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in frames]
    pictures[0].save(data / "a.gif", save_all=True, append_images=pictures[1:])
    (data / "b").mkdir()
    for number, picture in enumerate(pictures[:3]):
        picture.save(data / "b" / f"{number}.png")
    mixed = {"image": ["0.png"], "video": ["a.gif", "b"]}
    records = [
        {"video": "b", "conversations": _turns("what moves here <video>")},
        mixed | {"conversations": _turns("<video>then <image>and <video>\nwhat moves")},
        mixed | {"text": "first <video> then <image> and <video> which is all"},
    ]
    (data / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return data


def _turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]


ONEVISION = ["--tiling", "anyres_max_9", "--min_frames", "5", "--max_frames", "5"]


def _texts(packs: PackedDataset, folder: Path) -> list[str]:
    """Return the text of each sample, with the length of each run of image tokens in brackets."""
    context = packs.manifest.context_token_id
    words = load_tokenizer(folder / "packs" / "tokenizer")
    stored = packs.reader.read(0)
    found = []
    for tokens in np.split(stored.tokens, np.cumsum(stored.lengths)[:-1]):
        text = ""
        for is_image, run in itertools.groupby(tokens.tolist(), context.__eq__):
            ids = list(run)
            text += f"[{len(ids)}]" if is_image else words.decode(ids, skip_special_tokens=True)
        found.append(text)
    return sorted(text.partition("USER: ")[2] or text for text in found)


def test_a_video_is_one_image_in_the_text(videos: Path) -> None:
    packs = pack(videos, *ONEVISION)
    # 4 features a frame and one newline; the only image of a record has a grid.
    assert _texts(packs, videos) == [
        "[13]\nwhat moves here ASSISTANT: a cat",
        "[21]then [52]and [13]\nwhat moves ASSISTANT: a cat",
        "first [21]then [52]and [13]which is all",
    ]
    stored = packs.reader.read(0)
    numbers = numbers_in_pack(stored.images, packs.layout, 16)
    assert len(numbers) == int((stored.tokens == packs.manifest.context_token_id).sum())
    first = 0
    places = iter(numbers.tolist())
    tiles = packs.batch(0, 0).tiles.numpy()
    for index, row in enumerate(stored.images):
        count = packs.layout.count(as_tiled(stored.images[index : index + 1])[0])
        own = [next(places) for _ in range(count)]
        if not row["columns"]:
            assert own == [MIXED] * 4 + ([NEWLINE] if row["rows"] == 1 else [])
            # Another shape, not filled up to a square.
            pixels = decode.decode_pixels(stored.image(index))
            [expected] = decode.cut_tiles(pixels, 1, 1, 28, False)
            assert np.array_equal(tiles[first], expected)
            assert (row["width"], row["height"], row["tiles"]) == (70, 40, 1)
        first += row["tiles"]
    augmented = replace(packs.manifest.sources[0], augment=True)
    replace(packs.manifest, sources=(augmented,)).write(videos / "packs")
    flipped = PackedDataset(videos / "packs", augment=("flip",)).batch(0, 0).tiles.numpy()
    places = np.cumsum(stored.images["tiles"]) - 1
    for place in places[stored.images["frames"] > 0]:  # not filled up to squares
        sides = [abs(flipped[place][..., ::step].astype(int) - tiles[place]) for step in (1, -1)]
        assert min(side.mean() for side in sides) < 2
    left = stored.images["frames"][stored.images["frames"] > 0].tolist()
    assert [left.count(number) for number in (5, 4, 3, 2, 1)] == [2, 2, 5, 5, 5]


@pytest.mark.parametrize(
    ("options", "text", "images"),
    [
        (["--window_images", "2"], ["[13]which is all", "first [21]then [52]and "], [6, 3]),
        (["--window_tokens", "70"], ["[52]and [13]which is", "first [21]then "], [5, 4]),
        (["--truncate", "26"], ["first [21]"], [5]),
        (["--truncate", "10"], "would cut the video at image 1 in two: raise --truncate", []),
        (["--truncate", "60"], "would cut image 2 in two: raise --truncate", []),
    ],
)
def test_a_video_is_kept_or_lost_as_a_whole(
    videos: Path, options: list[str], text: list[str] | str, images: list[int]
) -> None:
    records = videos / "records.jsonl"
    records.write_text(records.read_text().split("\n")[-1])
    options = [*ONEVISION, *options, "--max_rejects", "0"]
    if isinstance(text, str):
        with pytest.raises(ValueError, match=text):
            pack(videos, *options)
        return
    packs = pack(videos, *options)
    assert _texts(packs, videos) == text
    assert sorted(np.bincount(packs.reader.read(0).images["sample"])) == sorted(images)


def test_slices_of_ranks_hold_every_feature_and_newline_once(data: Path) -> None:
    packs = pack(data)
    whole = packs.batch(0, 0)
    slices = [
        packs.batch(0, 0, BatchOptions(rank_slice=RankSlice(context_rank=rank, context_ranks=2)))
        for rank in range(2)
    ]
    found = torch.cat([one.feature_numbers for one in slices]).sort().values
    assert torch.equal(found, whole.feature_numbers.sort().values)
    assert sum(len(one.newline_positions) for one in slices) == len(whole.newline_positions) > 0
    for one in slices:
        assert (one.tokens[one.newline_positions] == packs.manifest.context_token_id).all()


def test_each_rank_has_the_mixed_features_of_its_own_tokens(videos: Path) -> None:
    packs = pack(videos, *ONEVISION, "--patch_size", "4")
    whole = packs.batch(0, 0)
    mixed = whole.mixed
    assert len(mixed.weights.unique(dim=0)) > 1, "7 features become 4, each by weights of its own"
    found = []
    for rank in range(2):
        own = RankSlice(context_rank=rank, context_ranks=2)
        part = packs.batch(0, 0, BatchOptions(rank_slice=own)).mixed
        positions = torch.from_numpy(own.tokens(whole.sample_ends.numpy()))[part.positions]
        is_own = torch.isin(mixed.positions, positions)
        assert torch.equal(positions, mixed.positions[is_own]) and len(positions) > 0
        assert torch.equal(part.numbers, mixed.numbers[is_own])
        assert torch.equal(part.weights, mixed.weights[is_own])
        found += positions.tolist()
    assert sorted(found) == mixed.positions.tolist()


def test_the_tiles_of_an_augmented_image_are_those_of_its_own_size(data: Path) -> None:
    plain = pack(data, "--data_augment")
    changed = PackedDataset(data / "packs", augment=("crop", "flip", "colour", "jpeg"))
    one, other = (packs.batch(0, 0).tiles for packs in (plain, changed))
    assert one.shape == other.shape and not np.array_equal(one, other)


def test_an_end_is_cut_off_behind_whole_images(data: Path) -> None:
    with pytest.raises(ValueError, match="would cut image 1 in two: raise --truncate"):
        pack(data, "--truncate", "60", "--max_rejects", "0")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tiling", "pad"], "--grids 1x1,3x2,2x2,1x3: goes with --tiling anyres"),
        (["--max_tiles", "6"], "--max_tiles 6: goes with --tiling dynamic; leave it out"),
        (["--min_tiles", "2", "--no_thumbnail"], "--min_tiles 2, --no_thumbnail: goes with"),
        (["--grids", "2x1,99999x99999"], "a grid has at most 1024 tiles"),
        (["--grids", "3"], "--grids 3: must be columns and rows of tiles"),
        (["--tokens_per_tile", "12"], "--tokens_per_tile 12: .*so use a square number"),
        (["--template", "clip", "--alignment", "1"], "--tiling anyres: --template clip has no"),
        (["--template", "flamingo"], "--tiling anyres: --template flamingo has no placeholder"),
        (["--capacity", "180"], "lower --grids"),
        (
            ["--template", "llava_plain", "--system", "Be kind."],
            "--system Be kind.: has no effect, since --template llava_plain has no system turn",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    data: Path, options: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        pack(data, *options)


def test_a_video_is_rejected(data: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nwhat"}, {"from": "gpt", "value": "a"}]
    with open(data / "records.jsonl", "a") as file:
        file.write("\n" + json.dumps({"video": "0.png", "conversations": turns}))
    packs = pack(data, "--max_rejects", "0.5")
    assert packs.manifest.rejects == {"unsupported": 1}
