"""Similar images stand side by side, and packs are filled in that order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.neighbours import fill_in_order
from megavlm.data.packing.settings import Job as Packing
from megavlm.data.records.meta_file import single_source
from megavlm.score import places
from megavlm.score.job import score_dataset
from megavlm.score.places import find_places
from megavlm.score.settings import Job
from tests.score.models import caption, make_image, make_towers, write_lines


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_kinds_of_images_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 16))
    kinds = np.repeat(np.arange(8), 32)
    rng.shuffle(kinds)
    images = unit(centres[kinds] + 0.1 * rng.standard_normal((256, 16)))
    found = find_places(images)
    assert sorted(found) == list(range(256))
    along = kinds[np.argsort(found)]
    assert (np.diff(along) != 0).sum() == 7  # shuffled, some 220
    monkeypatch.setattr(places, "_CHUNK", 7)
    assert np.array_equal(find_places(images), found)
    assert find_places(images[:0]).tolist() == []


def test_few_images_cost_no_products_of_the_size_of_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    solve = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda one: sizes.append(len(one)) or solve(one))
    rng = np.random.default_rng(1)
    line = np.outer(rng.permutation(64) - 31.5, rng.standard_normal(48))
    images = (line + 100 * rng.standard_normal(48)).astype(np.float16)
    found = find_places(images)
    # On a line, halves are halves of the line.
    place = np.argsort(np.argsort(line[:, 0]))
    groups = {frozenset(place[(found // 4) == number].tolist()) for number in range(16)}
    assert groups == {frozenset(range(4 * number, 4 * number + 4)) for number in range(16)}
    assert sorted(sizes) == [8] * 8 + [16] * 4 + [32] * 2 + [48]


def test_packs_are_filled_in_the_order_of_places() -> None:
    tokens = np.array([4, 4, 4, 4, 9])
    order = np.array([3, 0, 2, 1, 9])
    packing = fill_in_order(tokens, np.ones(5, int), order, capacity=9, tile_cap=2)
    assert packing.bin_of.tolist() == [1, 0, 1, 0, 2] and packing.bins == 3
    packing = fill_in_order(tokens, np.ones(5, int), order, capacity=100, tile_cap=3)
    assert packing.bin_of.tolist() == [1, 0, 0, 0, 1] and packing.bins == 2
    assert fill_in_order(tokens[:0], tokens[:0], order[:0], capacity=9, tile_cap=2).bins == 0
    with pytest.raises(ValueError, match="has more tokens than --capacity 8"):
        fill_in_order(tokens, np.ones(5, int), order, capacity=8, tile_cap=2)
    with pytest.raises(ValueError, match="has more tiles than --tile_cap 1"):
        fill_in_order(tokens, np.full(5, 2), order, capacity=9, tile_cap=1)


def test_pairs_of_like_images_share_a_pack(tmp_path: Path) -> None:
    make_towers(tmp_path / "clip", "clip")
    (tmp_path / "images").mkdir()
    # Four images that are there four times each.
    records = []
    for number in range(16):
        name = make_image(tmp_path / "images" / f"{number}.png", number % 4).name
        records.append({"image": name, "caption": caption(number)})
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    sources = single_source(lines, tmp_path / "images")
    scored = dict(sources=sources, model=str(tmp_path / "clip"), duplicates=0.0)
    score_dataset(Job(**scored, out=str(tmp_path / "scores"), places=True))
    score_dataset(Job(**scored, out=str(tmp_path / "plain")))
    usual = dict(
        sources=sources,
        tokenizer=str(tmp_path / "clip"),
        capacity=64,
        tile_cap=4,
        features_per_tile=0,
        template="clip",
        truncate=12,
        tiling=Tiling(tile_size=16, max_tiles=1, mode="crop"),
    )

    def lines_of(out: str, near: str) -> list[list[int]]:
        pack_dataset(Packing(**usual, out=str(tmp_path / out), near=near))
        reader = PackedDataset(tmp_path / out).reader
        return [reader.read(number).provenance["line"].tolist() for number in range(len(reader))]

    def kinds(out: str, near: str) -> list[set[int]]:
        return [{(line - 1) % 4 for line in pack} for pack in lines_of(out, near)]

    assert sorted(map(sorted, kinds("near", str(tmp_path / "scores")))) == [[0], [1], [2], [3]]
    assert max(map(len, kinds("usual", ""))) > 1
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "scores.json").write_bytes(b"\xff")
    for folder, told in (
        ("plain", "has no places; score again"),
        ("gone", "has no scores.json"),
        ("odd", "not a file of scores"),
    ):
        job = Packing(**usual, out=str(tmp_path / "no"), near=str(tmp_path / folder))
        with pytest.raises((ValueError, FileNotFoundError), match=f"--near .*{told}"):
            job.check()
    # Copies of a pair are not negatives of each other.
    usual["sources"] = tuple(dataclasses.replace(one, repeat_time=2.0) for one in sources)
    twice = lines_of("twice", str(tmp_path / "scores"))
    assert len(twice) == 8 and all(len(set(pack)) == len(pack) for pack in twice)
    usual["sources"] = single_source(lines, tmp_path / "images", difficulty="hard")
    job = Packing(**usual, out=str(tmp_path / "no"), near=str(tmp_path / "scores"))
    with pytest.raises(ValueError, match="--near .* excludes levels of difficulty"):
        job.check()
