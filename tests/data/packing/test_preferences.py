"""Two answers to one prompt through the packer and back: side by side in one pack, their images
once, and the packs the same however the job ran.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.images.feature_layout import feature_layout, numbers_in_pack
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing import job, scan
from megavlm.data.packing.job import Job, pack_dataset, plan_dataset
from megavlm.data.packing.windows import Windows
from megavlm.data.records.meta_file import single_source
from megavlm.data.store.reader import Pack, Reader
from tests.data.packing.test_resume import Stop, files, stop_at
from tests.data.preferences import (
    BOTH,
    CONTEXT,
    FEATURES,
    encoded,
    job_of,
    write_records,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("pairs"))


def _parts(pack: Pack) -> Iterator[tuple[int, np.ndarray, np.ndarray, list[bytes]]]:
    """Yield line, tokens, mask and images of each sample of a pack."""
    ends = np.cumsum(pack.lengths)
    for place, (line, _, _) in enumerate(pack.provenance.tolist()):
        part = slice(ends[place] - pack.lengths[place], ends[place])
        own = np.flatnonzero(pack.images["sample"] == place)
        images = [pack.image(number) for number in own]
        yield line, pack.tokens[part], pack.supervised[part], images


@pytest.mark.parametrize("alignment", [1, 2, 8, 64])
def test_no_pair_is_parted(data, tmp_path, alignment):
    """Each pair is in one pack, the chosen answer first, as often as its record is taken."""
    source = single_source(data / "pairs.jsonl", data, difficulty="hard")[0]
    sources = (dataclasses.replace(source, repeat_time=1.5),)
    report = pack_dataset(
        job_of(data, tmp_path / "out", sources=sources, alignment=alignment, levels=2)
    )
    reader = Reader(tmp_path / "out")
    manifest = reader.manifest
    assert manifest.preferences and reader.check() == report.packs == sum(
        level.packs for level in manifest.levels
    )
    assert len(manifest.levels) == 2
    wanted = encoded(data, alignment=alignment)
    taken = Counter()
    images = 0
    for number in range(len(reader)):
        pack = reader.read(number)
        used = sum(-(-int(length) // alignment) * alignment for length in pack.lengths)
        assert used <= 1024 and pack.tiles <= manifest.tile_cap
        parts = list(_parts(pack))
        assert len(parts) % 2 == 0
        for chosen, rejected in zip(parts[::2], parts[1::2], strict=True):
            assert chosen[0] == rejected[0]
            sample = wanted[chosen[0]]
            taken[chosen[0]] += 1
            for found, each in ((chosen, sample), (rejected, sample.rejected)):
                assert np.array_equal(found[1], each.tokens)
                assert np.array_equal(found[2], each.supervised)
                assert found[3] == [image.encoded for image in each.images]
        assert (pack.images["sample"] % 2 == 0).all()
        images += len(pack.images)
        record = reader.index[number]
        assert record["samples"] == len(parts) and record["images"] == len(pack.images)
        assert record["weight_sample"] == len(parts)
        numbers = numbers_in_pack(
            pack.images, feature_layout("dynamic", FEATURES), FEATURES, preferences=True
        )
        _check_features(pack, numbers)
    assert sorted(taken) == sorted(wanted) and set(taken.values()) == {1, 2}
    totals = manifest.totals
    assert (totals.samples, totals.images) == (900, images) == (report.samples, report.images)
    assert (report.pairs, report.records) == (450, 300)
    assert manifest.sources[0].samples == report.sources[0].samples == 900
    assert totals.tokens == sum(
        times * (wanted[line].length + wanted[line].rejected.length)
        for line, times in taken.items()
    )
    assert ", in 450 pairs of chosen and rejected" in report.text()


def _check_features(pack: Pack, numbers: np.ndarray) -> None:
    """Both placeholders of a feature, that of the chosen and that of the rejected, read it."""
    samples = np.repeat(np.arange(len(pack.lengths)), pack.lengths)
    of_number = samples[pack.tokens == CONTEXT]
    assert len(numbers) == len(of_number) == 2 * FEATURES * pack.tiles
    owner = np.repeat(pack.images["sample"], FEATURES * pack.images["tiles"])
    assert np.array_equal(owner[numbers], of_number - of_number % 2)
    for pair in np.unique(of_number // 2):
        first = numbers[of_number == 2 * pair]
        assert np.array_equal(first, numbers[of_number == 2 * pair + 1])
        assert np.array_equal(first, np.arange(first[0], first[0] + len(first)))
    assert np.array_equal(np.bincount(numbers, minlength=len(owner)), np.full(len(owner), 2))


def test_images_are_stored_once(data, tmp_path):
    """A pair takes up the bytes of its image once, where two samples alone take them twice."""
    lines = [
        {"image": "0.png", "question": "<image>\nq", "chosen": f"five {n}", "rejected": f"sign {n}"}
        for n in range(20)
    ]
    alone = [
        {"image": "0.png", "question": "<image>\nq", "answer": one[key]}
        for one in lines
        for key in ("chosen", "rejected")
    ]
    sizes = {}
    for name, records in (("both", lines), ("alone", alone)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        sources = single_source(tmp_path / f"{name}.jsonl", data)
        out = tmp_path / name
        pack_dataset(job_of(data, out, sources=sources, preferences=name == "both"))
        totals = Reader(out).manifest.totals
        sizes[name] = (totals.images, totals.tiles, totals.samples, totals.tokens)
        sizes[f"{name}.bytes"] = totals.bytes
    image = (data / "0.png").stat().st_size
    tiles = sizes["both"][1]
    assert sizes["both"] == (20, tiles, 40, sizes["alone"][3])
    assert sizes["alone"] == (40, 2 * tiles, 40, sizes["alone"][3])
    assert sizes["alone.bytes"] - sizes["both.bytes"] >= 20 * image


def test_records_without_a_preference_are_listed(data, tmp_path):
    report = pack_dataset(job_of(data, tmp_path / "out", "bad", max_rejects=0.5))
    assert report.rejects == {"no_preference": 2, "same_answers": 1, "too_long": 1}
    assert (report.packed_records, report.pairs) == (6, 6)
    with pytest.raises(ValueError, match="8 of 10 records .* were rejected") as caught:
        pack_dataset(job_of(data, tmp_path / "other", "bad", preferences=False, max_rejects=0.5))
    assert "tools/pack_dataset.py --preferences reads" in str(caught.value)


def test_a_dry_run_tells_what_is_packed(data, tmp_path):
    planned = plan_dataset(job_of(data, tmp_path / "out"))
    packed = pack_dataset(job_of(data, tmp_path / "out"))
    for name in ("samples", "pairs", "packs", "tokens", "tiles", "fill", "lengths", "tile_cap"):
        assert getattr(planned, name) == getattr(packed, name), name
    (one,) = planned.sources
    (other,) = packed.sources
    assert (one.samples, one.text_only, one.tokens, one.tiles) == (
        other.samples,
        other.text_only,
        other.tokens,
        other.tiles,
    )
    assert other.text_only == 2 * sum(not each.tiles for each in encoded(data).values())


@pytest.mark.parametrize("seed", range(2))
def test_stopped_anywhere(data, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 3)
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    settings = {"alignment": (1, 8)[seed], "workers": 2}
    pack_dataset(job_of(data, tmp_path / "whole", **settings))
    settings["workers"] = 0
    rng = random.Random(seed)
    whole_map = job.ordered_map
    runs = 0

    def stopping(function, tasks, workers, executor="processes"):
        left = rng.randint(1, 9)
        for result in whole_map(function, tasks, workers, executor):
            if not left:
                raise Stop
            left -= 1
            yield result

    monkeypatch.setattr(job, "ordered_map", stopping)
    monkeypatch.setattr(scan, "ordered_map", stopping)
    while not (tmp_path / "out").exists():
        runs += 1
        assert runs < 60
        try:
            pack_dataset(job_of(data, tmp_path / "out", **settings))
        except Stop:
            assert not (tmp_path / "out").exists()
    assert runs > 1
    expected = files(tmp_path / "whole")
    found = files(tmp_path / "out")
    assert expected.keys() == found.keys() and len(found) > 8
    assert all(expected[name] == found[name] for name in expected)


def test_another_kind_of_packs_does_not_go_on(data, tmp_path, monkeypatch):
    stop_at(monkeypatch, "plan_packs", lambda: pack_dataset(job_of(data, tmp_path / "out")))
    with pytest.raises(FileExistsError, match=r"preferences: True there, False requested"):
        pack_dataset(job_of(data, tmp_path / "out", preferences=False))


def test_a_pair_that_changed_between_the_passes_is_left_out(data, tmp_path, monkeypatch):
    """Also if the other answer alone did."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"question": "q", **BOTH})
    path.write_text(f"{line}\n" * 3)
    sources = single_source(path)
    settings = {"sources": sources, "max_rejects": 0.5}
    gather = job.gather_samples

    def change(*arguments):
        changed = line.replace('"rejected": "five"', '"rejected": "five five five"')
        path.write_text(f"{line}\n{line}\n{changed}\n")
        return gather(*arguments)

    monkeypatch.setattr(job, "gather_samples", change)
    report = pack_dataset(job_of(data, tmp_path / "out", **settings))
    assert (report.pairs, report.rejects) == (2, {"changed": 1})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"template": "clip", "tiling": Tiling(tile_size=16, mode="crop"), "features_per_tile": 0},
         "--preferences: a text of --template clip is no answer"),
        ({"windows": Windows(tokens=64)}, "leave --window_tokens and"),
        ({"windows": Windows(images=2)}, "leave --window_tokens and"),
        ({"truncate": 300}, "--truncate 300: an answer without its end"),
        ({"near": "scores"}, "--near scores"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_preferences_are_refused(
    data, tmp_path, monkeypatch, settings, told
):
    monkeypatch.setattr(Job, "_check_near", lambda self: None)  # there are no such scores
    with pytest.raises(ValueError, match=told):
        pack_dataset(job_of(data, tmp_path / "out", **settings))
    assert list(tmp_path.iterdir()) == []
