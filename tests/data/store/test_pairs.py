"""Packs of a chosen and a rejected sample side by side: what is written is what is read, and packs
of another kind are refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.images.feature_layout import feature_layout, mixed_in_pack, numbers_in_pack
from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.memory_reader import MemoryReader
from megavlm.data.store.pack_format import IMAGE, PackRules, pack_block
from megavlm.data.store.reader import Pack, Reader
from tests.data.samples import make_sample, store_packs

FACTS = {"vocab_size": 512, "context_token_id": 500, "tile_size": 32, "features_per_tile": 4}
MANIFEST = Manifest(
    tokenizer_fingerprint="x",
    vocab_size=512,
    context_token_id=500,
    template="t",
    image_size=32,
    features_per_tile=4,
    capacity=600,
    tile_cap=99,
    instruction_length=3,
    alignment=8,
    preferences=True,
)


def make_pair(rng: np.random.Generator, line: int) -> Sample:
    """Make a sample with up to two images, and a rejected one that shows them too."""
    chosen = make_sample(
        rng,
        images=int(rng.integers(3)),
        text_tokens=int(rng.integers(2, 30)),
        line=line,
        instruction_tokens=3,
        **FACTS,
    )
    start = len(chosen.tokens) - int(chosen.supervised.sum())
    answer = rng.integers(2, 400, int(rng.integers(1, 30))).astype(np.int32)
    tokens = np.concatenate([chosen.tokens[:start], answer])
    rejected = Sample(
        tokens=tokens,
        supervised=np.arange(len(tokens)) >= start,
        images=(),
        source=chosen.source,
        line=chosen.line,
    )
    return dataclasses.replace(chosen, rejected=rejected)


def random_pairs(packs: int = 6) -> list[list[Sample]]:
    rng = np.random.default_rng(3)
    return [[make_pair(rng, line) for line in range(1, 5)] for _ in range(packs)]


def check(pack: Pack, pairs: list[Sample]) -> None:
    answers = [answer for pair in pairs for answer in (pair, pair.rejected)]
    assert pack.lengths.tolist() == [answer.length for answer in answers]
    assert np.array_equal(pack.tokens, np.concatenate([answer.tokens for answer in answers]))
    masks = [answer.supervised for answer in answers]
    assert np.array_equal(pack.supervised, np.concatenate(masks))
    lines = [(answer.line, answer.source) for answer in answers]
    assert list(zip(*(pack.provenance[name].tolist() for name in ("line", "source")))) == lines
    # Images and instructions stand with the chosen sample alone.
    images = [(2 * place, image) for place, pair in enumerate(pairs) for image in pair.images]
    assert pack.images["sample"].tolist() == [place for place, _ in images]
    assert [pack.image(number) for number in range(len(images))] == [
        image.encoded for _, image in images
    ]
    assert pack.provenance["instruction"].tolist() == [3, 0] * len(pairs)
    assert np.array_equal(pack.instructions, np.concatenate([pair.instruction for pair in pairs]))


def store(folder: Path, packs: list[list[Sample]], **facts: object) -> None:
    store_packs(folder, packs, dataclasses.replace(MANIFEST, **facts))


def test_round_trip(tmp_path):
    packs = random_pairs()
    store(tmp_path, packs)
    reader = Reader(tmp_path)
    assert reader.manifest.preferences and reader.check() == len(packs)
    in_memory = MemoryReader(packs, MANIFEST, "memory")
    for number, pairs in enumerate(packs):
        for each in (reader, in_memory):
            check(each.read(number), pairs)
        row = reader.index[number]
        answers = [answer for pair in pairs for answer in (pair, pair.rejected)]
        assert row["samples"] == row["weight_sample"] == 8
        assert row["tokens"] == sum(answer.length for answer in answers)
        assert row["longest"] == max(answer.length for answer in answers)
        assert row["tiles"] == sum(pair.tiles for pair in pairs)
        assert row["supervised"] == sum(int(answer.supervised[1:].sum()) for answer in answers)
        assert row["squared_lengths"] == sum(answer.length**2 for answer in answers)
        assert (row["instructions"], row["longest_instruction"]) == (12, 3)
        for name in ("samples", "tokens", "images", "tiles", "supervised", "weight_square"):
            assert row[name] == in_memory.index[number][name]
        origins = [reader.origin(reader.read(number), place) for place in range(8)]
        assert origins[::2] == origins[1::2]


def test_packs_hold_pairs_alone_or_none():
    pairs = random_pairs(1)[0]
    rules = PackRules(capacity=600, alignment=8, preferences=True)
    rules.check(pairs)
    alone = dataclasses.replace(pairs[0], rejected=None)
    with pytest.raises(ValueError, match="of which 1 have no rejected .* of preferences none may"):
        rules.check([*pairs[1:], alone])
    with pytest.raises(ValueError, match="of which 0 have .* packs without preferences all may"):
        dataclasses.replace(rules, preferences=False).check(pairs)
    for changes, told in (
        ({"images": alone.images or random_pairs(1)[0][1].images}, "images, or an instruction"),
        ({"instruction": np.ones(2, np.int32)}, "images, or an instruction"),
        ({"rejected": alone}, "images, or an instruction"),
        ({"line": 77}, "of another record"),
    ):
        other = dataclasses.replace(pairs[0].rejected, **changes)
        if changes.get("images") != ():
            with pytest.raises(ValueError, match=told):
                rules.check([dataclasses.replace(pairs[0], rejected=other)])


def test_a_pair_takes_up_both_of_its_samples():
    pair = random_pairs(1)[0][0]
    lengths = [-(-each.length // 8) * 8 for each in (pair, pair.rejected)]
    assert pair.extent(8) == lengths[0] + pair.rejected.length
    assert dataclasses.replace(pair, rejected=None).extent(8) == pair.length
    PackRules(capacity=sum(lengths), alignment=8, preferences=True).check([pair])
    rules = PackRules(capacity=sum(lengths) - 8, alignment=8, preferences=True)
    with pytest.raises(ValueError, match=f"takes {sum(lengths)} tokens"):
        rules.check([pair])
    PackRules(capacity=600, tile_cap=pair.tiles, preferences=True).check([pair])
    empty = dataclasses.replace(pair.rejected, tokens=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="samples that are not empty"):
        PackRules(capacity=600, preferences=True).check([dataclasses.replace(pair, rejected=empty)])
    _, record = pack_block([pair])
    assert record["samples"] == 2 and record["tiles"] == pair.tiles


@pytest.mark.parametrize("tiling", ["dynamic", "anyres", "anyres_max_9"])
def test_placeholders_of_both_samples_mean_the_same_features(tiling):
    """Against the images of each pair written twice."""
    layout = feature_layout(tiling, 16)
    rows = [(0, 40, 90, 2, 2, 5), (0, 90, 40, 2, 1, 3), (4, 50, 50, 4, 4, 17), (6, 9, 9, 1, 1, 2)]
    table = np.zeros(len(rows), IMAGE)
    names = ["sample", "width", "height", "columns", "rows", "tiles"]
    for number, row in enumerate(rows):
        for name, value in zip(names, row, strict=True):
            table[name][number] = value
    expected = []
    mixed = []
    first = 0
    for sample in (0, 4, 6):
        own = table[table["sample"] == sample]
        numbers = numbers_in_pack(own, layout, 16)
        expected += [np.where(numbers < 0, numbers, numbers + first)] * 2
        found = mixed_in_pack(own, layout, 16)
        mixed += [] if found is None else [found.numbers + first] * 2
        first += 16 * int(own["tiles"].sum())
    both = numbers_in_pack(table, layout, 16, preferences=True)
    assert np.array_equal(both, np.concatenate(expected))
    found = mixed_in_pack(table, layout, 16, preferences=True)
    assert (found is None) == (not mixed)
    if mixed:
        assert np.array_equal(found.numbers, np.concatenate(mixed))
    assert len(numbers_in_pack(table[:0], layout, 16, preferences=True)) == 0
