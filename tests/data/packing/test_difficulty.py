"""Levels of difficulty: every sample is in one, packs do not mix them, and the dataset says where
each begins.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.difficulty import find_levels
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.packing.plan import PackPlan, Samples, plan_packs
from megavlm.data.records.meta_file import Annotations, read_meta, single_source
from megavlm.data.records.reject import RejectError
from megavlm.data.store.manifest import FORMAT_VERSION, Level, read_manifest
from megavlm.data.store.reader import Reader

GOLDEN = Path(__file__).parents[2] / "golden"
VALUES = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 2.0, 3.0, 70.0]), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True)
@given(VALUES, st.integers(0, 9))
def test_a_level_holds_what_lies_between_its_bounds_and_none_is_empty(values, wanted):
    difficulty = np.array(values, np.float32)
    levels = find_levels(difficulty, wanted)
    assert len(levels.bounds) <= (wanted or 7)
    for number, (easiest, hardest) in enumerate(levels.bounds):
        own = difficulty[levels.of_sample == number]
        assert (own.min(), own.max()) == (easiest, hardest)
        assert np.array_equal(
            (difficulty >= easiest) & (difficulty <= hardest), levels.of_sample == number
        )
    assert list(levels.bounds) == sorted(levels.bounds) and levels.of_sample.min() >= 0
    if wanted == 0:
        assert [easiest for easiest, _ in levels.bounds] == sorted(set(values))


def test_levels_are_of_one_size_where_difficulties_differ():
    levels = find_levels(np.random.default_rng(0).random(1000), 4)
    assert np.bincount(levels.of_sample).tolist() == [250] * 4
    with pytest.raises(ValueError, match="--levels 0: records have 1000 different difficulties"):
        find_levels(np.arange(1000.0), 0)


def test_levels_lose_the_packs_that_are_not_written():
    levels = tuple(
        Level(packs=packs, easiest=place, hardest=place) for place, packs in enumerate((3, 1, 2))
    )
    plan = PackPlan(order=np.arange(6), starts=np.arange(7), tile_cap=1, levels=levels)
    assert [level.packs for level in plan.levels_without([])] == [3, 1, 2]
    assert [(level.packs, level.easiest) for level in plan.levels_without([0, 2, 3, 5])] == [
        (1, 0),
        (1, 2),
    ]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60
    ),
    st.integers(0, 3),
)
def test_no_pack_mixes_levels(sizes, seed):
    tokens, tiles, difficulty = np.array(sizes, np.int32).T
    samples = Samples(
        rows=np.arange(len(tokens), dtype=np.int32),
        tokens=tokens,
        tiles=tiles,
        levels=find_levels(difficulty, 0),
    )
    plan = plan_packs(samples, capacity=24, tile_cap=None, seed=seed)
    assert np.array_equal(np.sort(plan.order), np.arange(len(tokens))) and plan.starts[-1] == len(
        tokens
    )
    assert np.add.reduceat(tokens[plan.order], plan.starts[:-1]).max() <= 24
    assert np.add.reduceat(tiles[plan.order], plan.starts[:-1]).max() <= plan.tile_cap
    per_pack = [
        set(difficulty[plan.order[first:end]].tolist())
        for first, end in zip(plan.starts, plan.starts[1:], strict=False)
    ]
    assert all(len(found) == 1 for found in per_pack)
    assert [level for (level,) in per_pack] == [
        level.easiest for level in plan.levels for _ in range(level.packs)
    ]


def _job(folder: Path, sources, **settings) -> Job:
    tiling = Tiling(tile_size=16, max_tiles=4)
    return Job(
        sources=sources,
        out=str(folder),
        tokenizer=str(GOLDEN / "tokenizer"),
        capacity=256,
        features_per_tile=4,
        tiling=tiling,
        **settings,
    )


def _record(**fields) -> str:
    talk = [
        {"from": "human", "value": "what number reads the sign"},
        {"from": "gpt", "value": "the answer is five " * 4},
    ]
    return json.dumps({"conversations": talk, **fields}) + "\n"


def test_a_packed_dataset_has_its_levels_in_order(tmp_path):
    scores = np.random.default_rng(1).permutation(np.repeat([0.5, 3.0, 7.0, 8.0], 30)).tolist()
    lines = [_record(hard=score) for score in scores] + [
        _record(),
        _record(hard="very"),
        _record(hard=True),
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    sources = single_source(tmp_path / "a.jsonl", difficulty="hard")
    report = pack_dataset(_job(tmp_path / "packs", sources, levels=2, max_rejects=0.1))
    manifest = read_manifest(tmp_path / "packs")
    assert [(level.easiest, level.hardest) for level in manifest.levels] == [(0.5, 3.0), (7.0, 8.0)]
    assert (
        sum(level.packs for level in manifest.levels) == manifest.totals.packs == report.packs
        and report.levels == manifest.levels
    )
    reader = Reader(tmp_path / "packs")
    seen = Counter()
    for pack in map(reader.read, range(len(reader))):
        level = int(pack.pack_id >= manifest.levels[0].packs)
        found = {scores[line - 1] for line in pack.provenance["line"].tolist()}
        assert found <= ({0.5, 3.0}, {7.0, 8.0})[level]
        seen.update(pack.provenance["line"].tolist())
    assert seen == Counter(range(1, 121))
    assert manifest.rejects == {"difficulty": 3} and "of difficulty 7 to 8" in report.text()
    rejects = [
        json.loads(line) for line in (tmp_path / "packs" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [reject["line"] for reject in rejects] == [
        121,
        122,
        123,
    ] and "hard is 'very', not a number" in rejects[1]["detail"]


def test_a_pack_that_is_not_written_is_missing_from_its_own_level(tmp_path, monkeypatch):
    """A shard counts its packs from its first one."""
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 2)
    whole = io.BytesIO()
    Picture.effect_noise((16, 16), 90).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-100])  # seen when it is packed
    lines = [_record(hard=score) for score in (1, 1, 1, 1, 2, 2)]
    lines.append(_record(hard=2, image="cut.png"))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    sources = single_source(tmp_path / "a.jsonl", tmp_path, difficulty="hard")
    report = pack_dataset(_job(tmp_path / "packs", sources, max_rejects=0.2))
    assert report.rejects == {"unreadable_image": 1}
    levels = read_manifest(tmp_path / "packs").levels
    assert [(level.packs, level.easiest) for level in levels] == [(4, 1), (2, 2)]
    assert report.levels == levels


def test_a_difficulty_may_be_a_whole_source_s(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(_record(hard=1) * 30)
    entries = {
        name: {"annotation": str(tmp_path / f"{name}.jsonl"), "difficulty": value}
        for name, value in (("a", 2), ("b", "hard"))
    }
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(entries))
    pack_dataset(_job(tmp_path / "packs", read_meta(meta)))
    manifest = read_manifest(tmp_path / "packs")
    assert [(level.easiest, level.hardest) for level in manifest.levels] == [(1, 1), (2, 2)]
    assert (
        Reader(tmp_path / "packs").read(0).provenance["source"].tolist()[0] == 1
    )  # b, the easier one, comes first
    del entries["a"]["difficulty"]
    meta.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="'a' has no difficulty, and others have"):
        read_meta(meta)
    meta.write_text(json.dumps({"a": entries["a"] | {"difficulty": True}}))
    with pytest.raises(
        ValueError, match="difficulty True must be the name of a field, or a number"
    ):
        read_meta(meta)
    job = _job(tmp_path / "other", single_source(tmp_path / "a.jsonl"), levels=3)
    with pytest.raises(ValueError, match="--levels 3: no source has a difficulty"):
        job.check()
    many = _job(
        tmp_path / "other", single_source(tmp_path / "a.jsonl", difficulty="hard"), levels=200
    )
    with pytest.raises(ValueError, match="--levels 200: must be at most 100"):
        many.check()


def test_a_dataset_of_the_version_before_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(_record() * 3)
    pack_dataset(_job(tmp_path / "packs", single_source(tmp_path / "a.jsonl")))
    facts = json.loads((tmp_path / "packs" / "manifest.json").read_text())
    assert facts.pop("levels") == [] and facts["version"] == FORMAT_VERSION
    (tmp_path / "packs" / "manifest.json").write_text(json.dumps(facts | {"version": 2}))
    reader = Reader(tmp_path / "packs")
    assert reader.manifest.levels == () and reader.check() == len(reader)


@pytest.mark.parametrize("value", [1e39, 10**400, float("nan"), True, "3", None])
def test_a_difficulty_is_a_number_that_a_row_can_hold(value):
    source = Annotations(name="a", path="a.jsonl", difficulty="hard")
    with pytest.raises(RejectError, match="difficulty: hard is .*, not a number"):
        source.difficulty_of({"hard": value})
