"""Records of all kinds with videos that are read in pairs of frames, in packs: preferences,
documents, what is cut off and what is refused, runs that are stopped, and drawings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.inspect import draw
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.packing import job
from tests.convert.tool import run_tool
from tests.data.films import BY_NAME, chat, pack, samples_of, write_films

SPANNING = BatchOptions(
    spans_tiles=True, window_tiles=4, tile_grid=2, rotary_axes=True, tokens_per_second=2
)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"))


def test_both_answers_show_the_same_frames(films: Path, tmp_path: Path) -> None:
    records = []
    for number in range(6):
        answers = {"rejected": {"from": "gpt", "value": "no idea"}}
        record = chat(
            "<video>and <image><video>",
            f"number {number}",
            video=["phone.mp4", "one.mp4"],
            image="still.png",
        )
        records.append(record | {"chosen": record["conversations"].pop()} | answers)
    packs = pack(films, tmp_path / "packs", records, "--preferences", "--frame_sampling", "rand")
    assert packs.manifest.preferences and packs.manifest.rejects == {}
    for number in range(len(packs)):
        stored = packs.reader.read(number)
        assert set(stored.images["sample"] % 2) == {0}
        batch = packs.batch(number, 0, SPANNING)
        assert batch.feature_numbers.bincount().tolist() == [2] * stored.tiles
        ends = batch.sample_ends.tolist()
        is_image = batch.tokens == packs.manifest.context_token_id
        for sample in range(0, batch.samples, 2):
            start, middle = ends[sample : sample + 2]
            last = int(is_image[start:middle].nonzero()[-1])
            chosen = batch.rotary_positions[:, start : start + last]
            assert chosen.equal(batch.rotary_positions[:, middle : middle + last])


@pytest.mark.parametrize("recipe", ["qwen2_5_vl", "qwen3_vl"])
def test_windows_of_documents_keep_pairs_together(films: Path, tmp_path: Path, recipe: str) -> None:
    words = " ".join(f"word{number}" for number in range(9))
    text = f"{words}<video>{words}<image>{words}\n<video>\n{words}"
    record = {"text": text, "video": ["a.gif", "phone.mp4"], "image": ["still.png"]}
    whole = pack(films, tmp_path / "whole", [record], recipe=recipe)
    [sample] = samples_of(whole)
    assert len(sample.images) == 9 and f"{words}<|vision_start|>" in sample.text.replace(
        "<0.1 seconds>", ""
    )
    assert ("<0.1 seconds>" in sample.text) == (recipe == "qwen3_vl")
    packs = pack(films, tmp_path / "cut", [record], "--window_tokens", "60", recipe=recipe)
    windows = list(samples_of(packs))
    assert len(windows) > 2
    images = sorted(
        (content, row["tiles"], row["frames"]) for one in windows for row, content in one.images
    )
    expected = sorted((content, row["tiles"], row["frames"]) for row, content in sample.images)
    assert images == expected
    for number in range(len(packs)):
        stored = packs.reader.read(number)
        batch = packs.batch(number, 0, SPANNING)
        shown = (stored.tokens == packs.manifest.context_token_id).sum()
        assert shown == stored.tiles == batch.num_features == len(batch.tiles)
        # A second frame stands behind its first, in its sample.
        seconds = np.flatnonzero(stored.images["tiles"] == 0)
        assert (stored.images["sample"][seconds] == stored.images["sample"][seconds - 1]).all()
        assert (stored.images["tiles"][seconds - 1] > 0).all()
    limited = pack(films, tmp_path / "few", [record], "--window_images", "1", recipe=recipe)
    pairs = 2 if recipe == "qwen3_vl" else 1
    assert len(list(samples_of(limited))) == 2 * pairs + 1


def test_what_is_cut_off_is_a_whole_video(films: Path, tmp_path: Path) -> None:
    turns = [("human", "<video>\na"), ("gpt", "b"), ("human", "<video>\nc"), ("gpt", "d")]
    record = {
        "video": ["phone.mp4", "a.gif"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }
    packs = pack(films, tmp_path / "whole", [record])
    whole = packs.reader.read(0)
    places = np.flatnonzero(whole.tokens == packs.manifest.context_token_id)
    second = int(places[whole.images["tiles"][:4].sum()])
    cut = pack(films, tmp_path / "cut", [record], "--truncate", str(second))
    [sample] = samples_of(cut)
    assert len(sample.images) == 4
    assert cut.batch(0, 0, SPANNING).num_features == cut.reader.read(0).tiles
    line = rejected(films, tmp_path, [record], "--truncate", str(second + 3))
    assert "too_long" in line and "would cut the video at image 2 in two" in line


def rejected(films: Path, folder: Path, records: list[dict], *options: str, recipe="qwen2_5_vl"):
    """Return the only rejected record of a packing, as it is told to the user."""
    good = chat("what", "text")
    packs = pack(films, folder / "rejected", [good, *records], *options, recipe=recipe)
    [line] = (packs.folder / "rejects.jsonl").read_text().splitlines()
    return line


@pytest.mark.parametrize(
    ("media", "options", "told"),
    [
        (
            "long.mp4",
            ["--capacity", "48"],
            r"raise --capacity or lower --max_frames or --video_min_pixels",
        ),
        (
            "folder",
            ["--tile_cap", "8"],
            "of 6 images, but a pack holds 8: raise --tile_cap or lower",
        ),
        ("mixed", [], "its frames have different sizes in pixels: 20 x 30, 30 x 20"),
        ("strip", [], "strip: an image of 402 x 2 pixels; one side may be 200 times as long"),
        ("broken.mp4", [], "broken.mp4: not a video that can be read"),
        ("short.mp4", ["--frame_sampling", "rand", "--min_frames", "9"], None),
    ],
)
@pytest.mark.parametrize("recipe", ["qwen2_vl", "qwen3_vl"])
def test_what_cannot_be_packed_is_told(
    films: Path, tmp_path: Path, media: str, options: list[str], told: str | None, recipe: str
) -> None:
    for name, sizes in (("mixed", [(20, 30), (30, 20)]), ("strip", [(402, 2)])):
        (films / name).mkdir(exist_ok=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(films / name / f"{number}.png")
    (films / "broken.mp4").write_bytes((films / "short.mp4").read_bytes()[:700])
    record = chat("<video>", video=media)
    if told is None:
        [sample] = samples_of(pack(films, tmp_path / "out", [record], *options, recipe=recipe))
        assert len(sample.images) == 12
        return
    if recipe == "qwen3_vl" and media == "long.mp4":
        options = ["--capacity", "140"]
    assert told in rejected(films, tmp_path, [record], *options, recipe=recipe)


class Stop(Exception):
    """Ends a packing."""


def test_a_packing_that_was_stopped_goes_on(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    names = ["short.mp4", "phone.mp4", "folder", "a.gif"]
    records = [chat("<video>", f"{number}", video=names[number % 4]) for number in range(24)]
    options = ["--capacity", "256", "--frame_sampling", "rand"]
    whole = pack(films, tmp_path / "whole", records, *options)
    shards = list((tmp_path / "whole").glob("packs-*.bin"))
    assert len(shards) > 2
    ordered_map = job.ordered_map

    def stopping(function, *arguments, **settings):
        for number, result in enumerate(ordered_map(function, *arguments, **settings)):
            if function is job.write_shard and number == 1:
                raise Stop
            yield result

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(job, "ordered_map", stopping)
        pack(films, tmp_path / "out", records, *options)
    assert not (tmp_path / "out").exists()
    again = pack(films, tmp_path / "out", records, *options)
    for name in ("packs.idx", *(path.name for path in shards)):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_packs_with_videos_are_shown(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [chat("<video>and<image>", video="phone.mp4", image="still.png")]
    packs = pack(films, tmp_path / "packs", records)
    found = draw.pictures(packs, packs.reader.read(0))
    assert [picture.shape[:2] for picture in found] == [(84, 56)] * 4 + [(28, 56)]
    film = BY_NAME["phone.mp4"]
    for picture, number in zip(found, film.chosen, strict=False):
        expected = np.asarray(film.pictures[number].resize((56, 84), Image.Resampling.BICUBIC))
        assert np.abs(picture.astype(float) - expected).mean() < 3
    options = ["--check", "--picture", str(tmp_path / "drawn.png")]
    assert run_tool(str(packs.folder), *options, tool="inspect_dataset") == 0
    assert "5 images" in capsys.readouterr().out
