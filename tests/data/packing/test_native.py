"""Images of any size as packs of whole tiles, from the command line of the packer to batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.config.recipes.qwen2_5_vl import ARCHITECTURE
from megavlm.config.tiling import NOTHING_STATED, VideoPixels
from megavlm.data.images.decode import decode_tiles
from megavlm.data.images.native import native_grid
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import pack_dataset, plan_dataset
from megavlm.data.packing.settings import Job
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.evaluate.packs import tiling_of
from megavlm.model_source import image_model, stated_tiles
from tests.convert.qwen_vl_models import SMALL, make_qwen_vl
from tests.convert.tool import run_tool

GOLDEN = Path(__file__).parents[2] / "golden"
# Width and height; the first is larger than the largest size, the last smaller than the least.
SIZES = [(300, 200), (56, 28), (140, 310), (400, 30), (9, 5)]
BOUNDS = (1568, 40 * 784)
RECIPE = [
    "--recipe",
    "qwen2_5_vl",
    "--stage",
    "sft",
    "--min_pixels",
    "1568",
    "--max_pixels",
    "31360",
]
SPANNING = BatchOptions(spans_tiles=True, window_tiles=4, tile_grid=2, rotary_axes=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    add_special_tokens(tokenizer, "qwen2_vl")
    tokenizer.save_pretrained(tmp_path / "words")
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shown = [f"{number}.png"] if number else ["0.png", "1.png"]
        prompt = {"from": "human", "value": "<image>" * len(shown) + f"\nwhich is {number}"}
        answer = {"from": "gpt", "value": f"it is {number}"}
        lines.append({"image": shown, "conversations": [prompt, answer]})
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def pack(data: Path, *options: str, out: str = "packs") -> PackedDataset:
    files = ["--jsonl", str(data / "records.jsonl"), "--root", str(data), "--workers", "0"]
    files += ["--tokenizer", str(data / "words"), "--out", str(data / out)]
    args = parse([*files, *RECIPE, "--capacity", "512", "--alignment", "4", *options])
    pack_dataset(make_job(args, ARCHITECTURE))
    return PackedDataset(data / out)


def test_a_recipe_packs_images_in_tiles_of_their_own_size(data: Path) -> None:
    packs = pack(data)
    manifest = packs.manifest
    assert (manifest.tiling, manifest.template) == ("native", "qwen2_vl")
    assert (manifest.min_pixels, manifest.max_pixels) == BOUNDS
    assert (manifest.image_size, manifest.features_per_tile) == (28, 1)
    assert manifest.pixel_mean == ARCHITECTURE.vision.pixel_mean
    asked = tiling_of(manifest)  # images of questions
    assert (asked.mode, asked.min_pixels, asked.max_pixels) == ("native", *BOUNDS)
    seen = set()
    for number in range(len(packs)):
        stored = packs.reader.read(number)
        batch = packs.batch(number, 0, SPANNING)
        plain = packs.batch(number, 0)
        first = 0
        for index, row in enumerate(stored.images):
            size = int(row["width"]), int(row["height"])
            grid = int(row["columns"]), int(row["rows"])
            assert grid == native_grid(*size, 28, *BOUNDS)
            count = grid[0] * grid[1]
            assert row["tiles"] == count
            expected = decode_tiles(
                (data / f"{SIZES.index(size)}.png").read_bytes(), *grid, 28, False
            )
            assert stored.image(index) == (data / f"{SIZES.index(size)}.png").read_bytes()
            own = batch.feature_numbers[first : first + count]
            assert np.array_equal(batch.tiles[own].numpy(), expected)
            assert np.array_equal(plain.tiles[first : first + count].numpy(), expected)
            first += count
            seen.add((size, grid))
        assert batch.num_features == first == len(batch.feature_positions)
        assert batch.media is None
    assert {size for size, _ in seen} == set(SIZES)
    assert dict(seen)[300, 200] == (7, 5) and dict(seen)[9, 5] == (2, 2)


def test_both_answers_of_a_preference_show_the_same_images(data: Path) -> None:
    records = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
    for record in records:
        record["chosen"] = record["conversations"].pop()
        record["rejected"] = {"from": "gpt", "value": "no idea"}
    (data / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    packs = pack(data, "--stage", "dpo")
    assert packs.manifest.preferences
    for number in range(len(packs)):
        batch = packs.batch(number, 0, SPANNING)
        tiles = packs.reader.read(number).tiles
        assert len(batch.tiles) == tiles == batch.num_features
        assert batch.feature_numbers.bincount().tolist() == [2] * tiles
        ends = batch.sample_ends.tolist()
        for sample in range(0, batch.samples, 2):
            start, middle = ends[sample : sample + 2]
            is_image = batch.tokens == packs.manifest.context_token_id
            last = int(is_image[start:middle].nonzero()[-1])
            chosen = batch.rotary_positions[:, start : start + last]
            assert chosen.equal(batch.rotary_positions[:, middle : middle + last])


def test_an_augmented_image_keeps_its_tiles(data: Path) -> None:
    plain = pack(data, "--data_augment")
    changed = PackedDataset(data / "packs", augment=("crop", "flip", "colour", "jpeg"))
    one, other = (packs.batch(0, 0, SPANNING) for packs in (plain, changed))
    assert one.tiles.shape == other.tiles.shape and not one.tiles.equal(other.tiles)
    assert one.images == other.images
    # A flip alone turns the rows of the whole image around.
    flipped = PackedDataset(data / "packs", augment=("flip",))
    found = set()
    for position in range(8):
        batch = flipped.batch(0, position)
        row = flipped.reader.read(0).images[0]
        columns, rows = (int(row[name]) for name in ("columns", "rows"))
        own, before = (
            tiles[: columns * rows].view(rows, columns, 3, 28, 28).permute(2, 0, 3, 1, 4).flatten(3)
            for tiles in (batch.tiles, plain.batch(0, 0).tiles)
        )
        is_flipped = own.float().sub(before.flip(3).float()).abs().mean() < 3
        assert is_flipped or own.equal(before)
        found.add(bool(is_flipped))
    assert found == {False, True}


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_training_sees_what_is_transparent_as_white(data: Path, augment: tuple[str, ...]) -> None:
    Image.new("RGBA", (56, 56), (9, 9, 9, 0)).save(data / "1.png")
    pack(data, "--data_augment")
    packs = PackedDataset(data / "packs", augment=augment)
    sizes = packs.reader.read(0).images
    white = np.flatnonzero((sizes["width"] == 56) & (sizes["height"] == 56))[0]
    last = int(sizes["tiles"][: white + 1].sum())
    assert (packs.batch(0, 0).tiles[last - 4 : last] == 255).all()


def test_truncated_conversations_keep_whole_images(data: Path) -> None:
    turns = [("human", "<image>\na"), ("gpt", "b"), ("human", "<image>\nc"), ("gpt", "d")]
    record = {
        "image": ["1.png", "2.png"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }
    (data / "records.jsonl").write_text(json.dumps(record))
    packs = pack(data)
    whole = packs.reader.read(0)
    places = np.flatnonzero(whole.tokens == packs.manifest.context_token_id)
    second = int(places[whole.images["tiles"][0]])
    for end, images in ((len(whole.tokens) - 2, 2), (second - 1, 1), (second, 1)):
        cut = pack(data, "--truncate", str(end), out=f"cut{end}")
        stored = cut.reader.read(0)
        assert len(stored.tokens) == end and len(stored.images) == images
        batch = cut.batch(0, 0, SPANNING)
        assert batch.num_features == len(batch.tiles) == stored.tiles
    with pytest.raises(ValueError, match="would cut image 2 in two"):
        pack(data, "--truncate", str(second + 1), out="inside")


def asked_job(data: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Job:
    """Return the job that a command line asks for, without doing it."""
    jobs: list[Job] = []

    def stop(job: Job) -> None:
        jobs.append(job)
        raise ValueError

    monkeypatch.setattr("megavlm.data.packing.job.pack_dataset", stop)
    files = ["--jsonl", str(data / "records.jsonl"), "--tokenizer", str(data / "words")]
    assert run_tool(*files, *options, "--out", str(data / "x"), tool="pack_dataset") == 2
    [job] = jobs
    return job


@pytest.mark.parametrize(
    ("recipe", "given", "facts"),
    [
        ("qwen3_vl", [], (32, 65536, 16777216, "qwen3_vl")),
        ("qwen3_vl", ["--model", "qwen3-vl-2b"], (32, 65536, 16777216, "qwen3_vl")),
        ("qwen3_vl", ["--max_pixels", "8388608"], (32, 65536, 8388608, "qwen3_vl")),
        ("qwen2_5_vl", [], (28, 3136, 1003520, "qwen2_vl")),
    ],
)
def test_packs_have_the_bounds_of_the_recipe(
    data: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, given: list[str], facts: tuple
) -> None:
    job = asked_job(data, monkeypatch, "--recipe", recipe, "--stage", "1", *given)
    tiling = job.tiling
    found = (tiling.tile_size, tiling.min_pixels, tiling.max_pixels, job.template)
    assert found == facts


def folder_with_bounds(folder: Path) -> Path:
    """Write a small Qwen2.5-VL whose images have 1,024 to 8,192 pixels."""
    make_qwen_vl(folder, SMALL)
    path = folder / "preprocessor_config.json"
    size = {"shortest_edge": 1024, "longest_edge": 8192}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    return folder


@pytest.mark.parametrize(
    ("recipe", "given", "bounds", "frames"),
    [
        ("qwen2_vl", [], (100352, 602112, 5780275), (4, 768, 2, "fps2")),
        ("qwen2_5_vl", ["--capacity", "32768"], (100352, 602112, 23121100), (4, 768, 2, "fps2")),
        ("qwen3_vl", [], (1024, 786432, 7549747), (4, 768, 2, "fps2")),
        (
            "qwen2_5_vl",
            ["--video_min_pixels", "9", "--video_max_pixels", "999", "--video_total_pixels", "784"],
            (9, 999, 784),
            (4, 768, 2, "fps2"),
        ),
        (
            "qwen3_vl",
            ["--min_frames", "6", "--max_frames", "8", "--frame_sampling", "middle"],
            (1024, 786432, 7549747),
            (6, 8, 2, "middle"),
        ),
        ("internvl", [], (0, 0, 0), (8, 32, 1, "rand")),
        ("internvl", ["--frame_sampling", "fps1"], (0, 0, 0), (1, 32, 1, "fps1")),
    ],
)
def test_videos_have_the_bounds_of_the_recipe(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    given: list[str],
    bounds: tuple[int, int, int],
    frames: tuple,
) -> None:
    of_recipe = [] if recipe == "internvl" else ["--recipe", recipe, "--stage", "1"]
    job = asked_job(data, monkeypatch, *of_recipe, *given)
    assert job.tiling.video == VideoPixels(least=bounds[0], most=bounds[1], total=bounds[2])
    choice = job.frames
    assert (choice.least, choice.max_frames, choice.multiple, choice.sampling) == frames


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ([], (1024, 8192)),
        (["--max_pixels", "4096"], (1024, 4096)),
        (["--min_pixels", "1"], (1, 8192)),
    ],
)
def test_packs_have_the_bounds_of_the_model(
    data: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], bounds: tuple[int, int]
) -> None:
    folder = folder_with_bounds(data / "hf")
    frames = {"min_pixels": 128, "max_pixels": 640, "max_video_tokens": 100}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(frames))
    form = ["--template", "qwen2_vl", "--tiling", "native", "--model", str(folder)]
    job = asked_job(data, monkeypatch, *form, *given)
    assert (job.tiling.min_pixels, job.tiling.max_pixels) == bounds
    assert job.tiling.tile_size == SMALL.vision.image_size
    assert job.tiling.video == VideoPixels(least=128, most=640, total=5760)
    assert stated_tiles("qwen2_5_vl") == NOTHING_STATED


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--max_pixels 1000", "--max_pixels 1000: --min_pixels is 1024 by {file}, and must be"),
        ("--min_pixels 9000", "--min_pixels 9000: --max_pixels is 8192 by {file}, and must be"),
    ],
)
def test_a_bound_that_the_model_crosses_is_told_with_the_file_of_the_other(
    data: Path, given: str, told: str
) -> None:
    folder = folder_with_bounds(data / "hf")
    files = [
        "--jsonl",
        str(data / "records.jsonl"),
        "--tokenizer",
        str(data / "words"),
        "--dry_run",
    ]
    form = ["--template", "qwen2_vl", "--tiling", "native", "--model", str(folder)]
    args = parse([*files, *form, *given.split()])
    file = folder / "preprocessor_config.json"
    with pytest.raises(ValueError, match="give --") as raised:
        make_job(args, image_model(args.model), stated_tiles(args.model))
    assert str(raised.value).startswith(told.format(file=file))
    with pytest.raises(ValueError, match="--max_pixels 3000: --min_pixels is 3136 by default"):
        make_job(parse([*files, *form[:4], "--max_pixels", "3000"]), ARCHITECTURE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--min_pixels", "40000"], "--min_pixels 40000 and --max_pixels 31360: must be 1 <= min"),
        (["--max_pixels", "700", "--min_pixels", "1"], "--max_pixels 700: must be from 784"),
        (
            ["--tiling", "stretch"],
            "--min_pixels 1568, --max_pixels 31360: goes with --tiling native; leave it out",
        ),
        (
            ["--video_min_pixels", "790", "--video_max_pixels", "786"],
            "--video_min_pixels 790, --video_max_pixels 786 and .* must be 1 <= min <= max",
        ),
        (["--video_max_pixels", "783", "--video_min_pixels", "9"], "max from 784, the pixels of"),
        (["--video_total_pixels", "783"], "total must be 784 or more, the pixels of one tile"),
        (["--min_frames", "9", "--max_frames", "8"], "--min_frames 9 and --max_frames 8: must be"),
        (["--max_tiles", "4"], "--max_tiles 4: goes with --tiling dynamic"),
        (["--no_thumbnail"], "--no_thumbnail: goes with --tiling dynamic"),
        (
            ["--template", "clip", "--alignment", "1"],
            "--tiling native: --template clip has no placeholder token for each feature",
        ),
        (["--template", "flamingo"], "--tiling native: --template flamingo has no placeholder"),
        (["--image_limit", "100x90"], "--image_limit 100x90: goes with --tiling patches"),
        (["--grids", "1x2"], "--grids 1x2: goes with --tiling anyres"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    data: Path, options: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        pack(data, *options)


def test_bounds_of_videos_go_with_images_of_any_size_alone(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--jsonl", str(data / "records.jsonl"), "--tokenizer", str(data / "words")]
    asked = ["--video_min_pixels", "784", "--video_total_pixels", "7840", "--out", str(data / "x")]
    assert run_tool(*files, *asked, tool="pack_dataset") == 2
    told = "--video_min_pixels 784, --video_total_pixels 7840: goes with --tiling native; leave it"
    assert told in capsys.readouterr().err


def test_what_no_pack_can_hold_names_the_option_that_makes_images_smaller(data: Path) -> None:
    packs = pack(data, "--tile_cap", "36", "--max_rejects", "0.2")
    assert packs.manifest.rejects == {"too_many_tiles": 1}
    [reject] = (data / "packs/rejects.jsonl").read_text().splitlines()
    assert "37 tiles of 2 images" in reject and "lower --max_pixels" in reject


def test_a_strip_is_rejected_with_its_size(data: Path) -> None:
    Image.new("RGB", (201, 1)).save(data / "2.png")
    packs = pack(data, "--max_rejects", "0.2")
    assert packs.manifest.rejects == {"image_shape": 1}
    [reject] = (data / "packs/rejects.jsonl").read_text().splitlines()
    detail = json.loads(reject)["detail"]
    assert detail.startswith(f"{data / '2.png'}: an image of 201 x 1 pixels")
    Image.new("RGB", (200, 1)).save(data / "2.png")
    assert pack(data, out="again").manifest.rejects == {}


def test_a_limit_of_tiles_that_has_no_effect_is_told(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"root": str(data), "annotation": str(data / "records.jsonl")}
    meta = {"boards": source | {"max_dynamic_patch": 6}, "others": source}
    (data / "meta.json").write_text(json.dumps(meta))
    words = ["--meta", str(data / "meta.json"), "--tokenizer", str(data / "words")]
    args = parse([*RECIPE, *words, "--capacity", "256", "--workers", "0", "--dry_run"])
    plan_dataset(make_job(args, ARCHITECTURE))
    assert "max_dynamic_patch of boards has no effect: it is for --tiling dynamic, and this is" in (
        capsys.readouterr().err
    )
