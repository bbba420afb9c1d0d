"""Images of any size as packs of patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.config.recipes.fuyu import ARCHITECTURE
from megavlm.data.images.patches import FILL, cut_patches, fitted_size, patch_grid
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import pack_dataset
from tests.convert.part_folders import make_fuyu_tokenizer

# Width and height; the third is larger than the limit.
SIZES = [(64, 31), (30, 90), (240, 60), (5, 7)]
OPTIONS = ["--template", "fuyu", "--tiling", "patches", "--image_limit", "120x90"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_fuyu_tokenizer(tmp_path / "words")
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\nwhich is number {number}"},
            {"from": "gpt", "value": f"it is {number}"},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return tmp_path


def pack(data: Path, *options: str) -> PackedDataset:
    files = ["--jsonl", str(data / "records.jsonl"), "--root", str(data), "--workers", "0"]
    files += ["--tokenizer", str(data / "words"), "--out", str(data / "packs")]
    args = parse([*files, *OPTIONS, "--capacity", "128", *options])
    pack_dataset(make_job(args, ARCHITECTURE))
    return PackedDataset(data / "packs")


def test_an_image_has_a_token_for_each_patch_and_one_for_each_row(data: Path) -> None:
    packs = pack(data)
    manifest = packs.manifest
    assert (manifest.tiling, manifest.image_limit) == ("patches", (120, 90))
    assert (manifest.image_size, manifest.features_per_tile) == (30, 1)
    newline = json.loads((data / "packs/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    newline = [piece for piece, _ in newline].index("|NEWLINE|")
    seen = {}
    for number in range(len(packs)):
        pack_ = packs.reader.read(number)
        batch = packs.batch(number, 0)
        assert batch.num_features == pack_.tiles == len(batch.tiles)
        starts = np.cumsum(pack_.lengths) - pack_.lengths
        first = 0
        for start, length, row in zip(starts, pack_.lengths, pack_.images, strict=True):
            tokens = pack_.tokens[start : start + length]
            columns, rows = (int(row[name]) for name in ("columns", "rows"))
            line = [manifest.context_token_id] * columns + [newline]
            assert tokens[: rows * (columns + 1)].tolist() == line * rows
            assert row["tiles"] == columns * rows
            size = int(row["width"]), int(row["height"])
            seen[size] = columns, rows
            fits = fitted_size(*size, (120, 90))
            image = Image.open(data / f"{SIZES.index(size)}.png")
            expected = cut_patches(image, fits, 30)
            count = columns * rows
            assert np.array_equal(batch.tiles[first : first + count].numpy(), expected)
            first += count
    assert seen == {(64, 31): (3, 2), (30, 90): (1, 3), (240, 60): (4, 1), (5, 7): (1, 1)}


def test_a_small_image_is_filled_up_and_a_large_one_made_smaller() -> None:
    image = Image.new("RGB", (40, 10), (9, 8, 7))
    patches = cut_patches(image, (40, 10), 30)
    assert patches.shape == (2, 3, 30, 30)
    assert (patches[0, 0, :10] == 9).all() and (patches[0, :, 10:] == FILL).all()
    assert (patches[1, 2, :10, :10] == 7).all() and (patches[1, :, :, 10:] == FILL).all()
    assert fitted_size(40, 10, (20, 20)) == (20, 5)
    assert fitted_size(2, 4000, (20, 20)) == (1, 20)
    assert patch_grid((31, 60), 30) == (2, 2)
    with pytest.raises(ValueError, match="0 x 3 pixels cannot be cut"):
        fitted_size(0, 3, (20, 20))


def test_the_tiles_of_an_augmented_image_are_those_of_its_own_size(data: Path) -> None:
    plain = pack(data, "--data_augment")
    changed = PackedDataset(data / "packs", augment=("crop", "flip", "colour", "jpeg"))
    one, other = (packs.batch(0, 0).tiles for packs in (plain, changed))
    assert one.shape == other.shape and not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image_limit", "100x90"], "--image_limit 100x90: both must be multiples of the patch"),
        (["--image_limit", "large"], "--image_limit large: must be width and height in pixels"),
        (["--tiling", "stretch"], "--image_limit 120x90: goes with --tiling patches"),
        (
            ["--tiling", "stretch", "--image_limit", ""],
            "--tiling stretch: --template fuyu has a token behind each row of patches",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    data: Path, options: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        pack(data, *options)


def test_what_no_pack_can_hold_names_the_option_that_makes_images_smaller(data: Path) -> None:
    with pytest.raises(ValueError, match="lower --image_limit"):
        pack(data, "--capacity", "30")
    assert Tiling(tile_size=30, mode="patches").size_flag == "--image_limit"


def test_a_video_is_rejected(data: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nwhat"}, {"from": "gpt", "value": "a"}]
    with open(data / "records.jsonl", "a") as file:
        file.write("\n" + json.dumps({"video": "0.png", "conversations": turns}))
    packs = pack(data, "--max_rejects", "0.5")
    assert packs.manifest.rejects == {"unsupported": 1}
