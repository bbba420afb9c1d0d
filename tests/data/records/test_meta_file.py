"""Meta files, mixtures and filters, good and bad."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.packing.repeats import take
from megavlm.data.packing.source_list import write_sources
from megavlm.data.records.meta_file import (
    Annotations,
    Filter,
    read_meta,
    read_sources,
    single_source,
)
from megavlm.data.records.reject import RejectError


def _meta(tmp_path, **entry):
    (tmp_path / "a.jsonl").touch()
    path = tmp_path / "meta.json"
    path.write_text(
        json.dumps(
            {"first": {"root": "pictures", "annotation": str(tmp_path / "a.jsonl"), **entry}}
        )
    )
    return path


def test_meta(tmp_path):
    path = _meta(tmp_path, data_augment=False, repeat_time=3, length=100, max_dynamic_patch=6)
    (source,) = read_meta(path)
    assert not source.augment and source.keep == Filter()
    assert (source.name, source.root, source.path) == (
        "first",
        "pictures",
        str(tmp_path / "a.jsonl"),
    )
    assert (source.repeat_time, source.max_tiles, source.weight) == (3, 6, None)
    (source,) = read_meta(_meta(tmp_path, repeat_time=0.25))
    assert (source.repeat_time, source.max_tiles) == (0.25, None)


BAD_ENTRIES = [
    ({"repeat": 2, "roots": ""}, "unknown key 'repeat', 'roots'; known: root, annotation"),
    ({"data_augment": "yes"}, "data_augment 'yes' must be true or false"),
    ({"repeat_time": 0}, "repeat_time 0 "),
    ({"weight": -1}, "weight -1 "),
    ({"filter": {"min_pixels": 3}}, "filter: unknown key 'min_pixels'; known: min_tokens"),
    ({"filter": {"score": "clip"}}, "filter: score goes with min_score or max_score"),
    ({"filter": {"scores": "x"}}, "filter: scores goes with min_score or max_score"),
    ({"filter": {"drop_duplicates": True}}, "filter: drop_duplicates goes with scores"),
    ({"filter": {"score": "a", "scores": "b", "min_score": 1}}, "score and scores exclude"),
    ({"filter": {"min_side": "3"}}, "filter: min_side '3' must be a number"),
    ({"filter": 3}, "filter: must be an object"),
    ({"prompt": 3}, "must be texts"),
    ({"annotation": []}, "annotation must be a path"),
    ({"repeat_time": True}, "repeat_time True "),
    ({"repeat_time": "2"}, "repeat_time '2' "),
    ({"repeat_time": float("inf")}, "repeat_time inf "),
    ({"repeat_time": 10**400}, "repeat_time 1000"),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch 0 "),
    ({"max_dynamic_patch": 10**9}, "max_dynamic_patch 1000000000 must be a whole number from 1 to"),
    ({"difficulty": 1e39}, "difficulty 1e+39 must be the name of a field, or a number up to 3.4e+"),
    ({"annotation": None}, "annotation must be a path, a pattern or a list of them, not None"),
    ({"root": "s3://bucket"}, "s3://bucket: object storage is not supported"),
]


@pytest.mark.parametrize(("entry", "words"), BAD_ENTRIES)
def test_bad_meta_entries(tmp_path, entry, words):
    with pytest.raises(ValueError, match="--meta .*meta.json: 'first': ") as caught:
        read_meta(_meta(tmp_path, **entry))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"a": {}, "a": {}}', '{"a": 3}', r'{"\ud800": {}}']
)
def test_bad_meta_files(tmp_path, text):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="--meta .*meta.json"):
        read_meta(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--meta .*nowhere.json"):
        read_meta(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="'first': annotation .*nowhere.jsonl"):
        read_meta(_meta(tmp_path, annotation=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(FileNotFoundError, match="--jsonl .*nowhere.jsonl"):
        single_source(tmp_path / "nowhere.jsonl")


def test_sources_are_one_file_or_a_meta_file(tmp_path):
    path = _meta(tmp_path)
    assert read_sources(str(path), None) == read_meta(path)
    assert read_sources(None, str(tmp_path / "a.jsonl"), "here") == single_source(
        tmp_path / "a.jsonl", "here"
    )
    with pytest.raises(ValueError, match="--root here: goes with --jsonl"):
        read_sources(str(path), None, "here")
    with pytest.raises(ValueError, match="--data_augment: goes with --jsonl"):
        read_sources(str(path), None, augment=True)


def test_all_sources_have_weights_or_none_has(tmp_path):
    first = json.loads(_meta(tmp_path, weight=2).read_text())
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(first | {"second": {"annotation": str(tmp_path / "a.jsonl")}}))
    with pytest.raises(ValueError, match="'second' has no weight, and others have"):
        read_meta(path)


def test_an_entry_may_name_many_files(tmp_path):
    for name in ("b-00.jsonl", "b-01.jsonl", "b-02.jsonl"):
        (tmp_path / name).touch()
    found = read_meta(
        _meta(
            tmp_path,
            annotation=[str(tmp_path / "b-{00..01}.jsonl"), str(tmp_path / "b-*2.jsonl")],
            data_augment=True,
        )
    )
    assert [source.path for source in found] == [
        str(tmp_path / f"b-0{place}.jsonl") for place in range(3)
    ]
    assert {source.name for source in found} == {"first"} and all(
        source.augment for source in found
    )
    with pytest.raises(FileNotFoundError, match="b-03.jsonl: there is no such file"):
        read_meta(_meta(tmp_path, annotation=str(tmp_path / "b-{02..04}.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"c-\*.jsonl: there is no such file"):
        read_meta(_meta(tmp_path, annotation=str(tmp_path / "c-*.jsonl")))


def _source(name: str, **settings) -> Annotations:
    return Annotations(name=name, path="a.jsonl", **settings)


def test_repeats_may_be_fractions():
    rows = np.array([0] * 10 + [1] * 4)
    counts = np.bincount(
        take(rows, [_source("a", repeat_time=2.5), _source("b")], seed=3), minlength=14
    )
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5 and set(counts[10:]) == {1}
    assert (
        np.bincount(take(rows, [_source("a", repeat_time=2.5), _source("b")], seed=4), minlength=14)
        != counts
    ).any()


def test_weights_are_shares_of_the_samples():
    rows = np.array([0] * 100 + [1] * 100 + [2] * 20)
    sources = [_source("a", weight=3.0), _source("a", weight=3.0), _source("b", weight=1.0)]
    taken = take(rows, sources, seed=0)
    assert len(taken) == 220 and np.count_nonzero(rows[taken] == 2) == 55
    assert set(np.bincount(taken, minlength=220)[200:]) == {2, 3}


def test_numbers_out_of_all_bounds_are_refused_or_weighed():
    rows = np.array([0, 1, 1])
    with pytest.raises(
        ValueError, match=r"repeat_time makes 1e\+10 samples of 3; .* at most 214748"
    ):
        take(rows, [_source("a", repeat_time=1e10), _source("b")], seed=0)
    huge = [_source("a", weight=1e308), _source("b", weight=1e308)]
    assert sorted(rows[take(rows, huge, seed=0)].tolist()) == [0, 0, 1, 1]


class _CountedName(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        _CountedName.compared += 1
        return str(self) == str(other)

    __hash__ = str.__hash__


def test_each_of_many_sources_is_looked_up_and_not_compared_with_all_others(tmp_path: Path):
    count = 400
    sources = [_source(_CountedName(f"s{number // 2}"), weight=1.0) for number in range(count)]
    rows = np.arange(3 * count) % count  # three records of each file
    assert np.bincount(take(rows, sources, seed=0)).tolist() == [1] * (3 * count)
    assert _CountedName.compared < 2 * count
    listed = write_sources(tmp_path, sources)
    assert listed.read() == tuple(sources) and listed.read() is listed.read()
    assert len(pickle.dumps(listed)) < 1000, "what is sent with each shard"


def test_filters():
    keep = Filter(
        min_tokens=5,
        max_tokens=9,
        min_side=10,
        max_side=100,
        max_aspect=2,
        score="clip",
        min_score=0.3,
    )
    keep.check_record({"clip": 0.3}, "a", 1)
    keep.check_image(50, 100)
    keep.check_length(9)
    bad = [
        (
            keep.check_record,
            ({"clip": 0.29}, "a", 1),
            "filtered_score",
            "clip: 0.29, wanted is at least 0.3",
        ),
        (keep.check_record, ({}, "a", 1), "filtered_score", "clip is None, not a number"),
        (keep.check_record, ({"clip": float("nan")}, "a", 1), "filtered_score", "clip is nan"),
        (keep.check_image, (9, 12), "filtered_size", "shorter side: 9"),
        (keep.check_image, (90, 120), "filtered_size", "longer side: 120"),
        (keep.check_image, (90, 30), "filtered_aspect", "aspect: 3"),
        (
            keep.check_length,
            (4,),
            "filtered_length",
            "tokens: 4, wanted is at least 5 and at most 9",
        ),
        (keep.check_length, (10,), "filtered_length", "tokens: 10"),
    ]
    for check, arguments, reason, words in bad:
        with pytest.raises(RejectError, match=words) as caught:
            check(*arguments)
        assert caught.value.reason == reason
