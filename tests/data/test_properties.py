"""What must hold of packing and order, whatever the data: tried on many random cases."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megavlm.data.loading.order import Plan
from megavlm.data.packing.best_fit import best_fit_python, pack
from megavlm.data.packing.plan import Samples, plan_packs
from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Reader
from tests.data.samples import store_packs
from tools.benchmark.packing_baselines import buffered, next_fit

CASES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
CAPACITIES = st.sampled_from([1, 5, 64, 130, 4100])


@st.composite
def sample_sizes(draw) -> tuple[int, int, int, np.ndarray, np.ndarray]:
    """Draw a capacity, a tile cap, an alignment, and the lengths and tiles of samples that fit in a
    pack.
    """
    alignment = draw(st.sampled_from([1, 2, 8]))
    capacity = draw(CAPACITIES) * alignment
    cap = draw(st.integers(0, 12))
    sizes = draw(
        st.lists(st.tuples(st.integers(1, capacity), st.integers(0, cap)), min_size=1, max_size=60)
    )
    lengths, tiles = np.array(sizes, np.int32).T
    return capacity, cap, alignment, lengths, tiles


@CASES
@given(sample_sizes(), st.integers(0, 5))
def test_every_sample_is_in_one_pack_and_none_is_over_capacity(sizes, seed):
    capacity, cap, alignment, lengths, tiles = sizes
    aligned = -(-lengths // alignment) * alignment
    samples = Samples(rows=np.arange(len(lengths), dtype=np.int32), tokens=aligned, tiles=tiles)
    for tile_cap in (cap, None):
        plan = plan_packs(samples, capacity=capacity, tile_cap=tile_cap, seed=seed)
        assert np.array_equal(np.sort(plan.order), np.arange(len(lengths)))
        assert np.add.reduceat(aligned[plan.order], plan.starts[:-1]).max() <= capacity
        assert np.add.reduceat(tiles[plan.order], plan.starts[:-1]).max() <= plan.tile_cap
        assert [len(plan.shard(number)) - 1 for number in range(plan.shards)] == [
            min(plan.packs_per_shard, plan.packs - number * plan.packs_per_shard)
            for number in range(plan.shards)
        ]


@CASES
@given(sample_sizes())
def test_every_rule_of_packing_keeps_its_limits(sizes):
    capacity, cap, alignment, lengths, tiles = sizes
    aligned = -(-lengths // alignment) * alignment
    order = np.argsort(-aligned, kind="stable")
    rules = {
        "ours": best_fit_python(aligned, tiles, order, capacity, cap, 1),
        "next_fit": next_fit(aligned, capacity),
        "buffered": buffered(aligned, tiles, capacity, max(cap, 1), 3),
    }
    for name, (bin_of, bins) in rules.items():
        assert set(bin_of.tolist()) == set(range(bins)), name
        assert np.bincount(bin_of, weights=aligned).max() <= capacity, name
        assert name == "next_fit" or np.bincount(bin_of, weights=tiles).max() <= max(cap, 1), name
    assert pack(aligned, tiles, capacity=capacity, tile_cap=cap).bins == rules["ours"][1]


@settings(CASES, max_examples=25)
@given(sample_sizes(), st.integers(0, 3))
def test_every_token_of_every_sample_is_in_one_pack(sizes, seed):
    capacity, cap, alignment, lengths, _ = sizes
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            tokens=rng.integers(0, 9, length, dtype=np.int32),
            supervised=rng.random(length) < 0.5,
            images=(),
            source=line % 3,
            line=line,
        )
        for line, length in enumerate(lengths.tolist(), start=1)
    ]
    aligned = -(-lengths // alignment) * alignment
    sizes = Samples(
        rows=np.arange(len(samples), dtype=np.int32), tokens=aligned, tiles=np.zeros_like(lengths)
    )
    plan = plan_packs(sizes, capacity=capacity, tile_cap=cap, seed=seed)
    facts = {
        "tokenizer_fingerprint": "x",
        "vocab_size": 9,
        "context_token_id": 8,
        "template": "t",
        "image_size": 2,
        "features_per_tile": 1,
    }
    packs = (
        [samples[place] for place in plan.order[first:end]]
        for first, end in zip(plan.starts[:-1], plan.starts[1:], strict=True)
    )
    manifest = Manifest(**facts, capacity=capacity, tile_cap=cap, alignment=alignment)
    with tempfile.TemporaryDirectory() as folder:
        store_packs(Path(folder), packs, manifest, shard_bytes=500)
        reader = Reader(folder)
        found = Counter()
        for stored in map(reader.read, range(len(reader))):
            ends = np.cumsum(stored.lengths)
            for (line, source, _), end, length in zip(
                stored.provenance.tolist(), ends, stored.lengths, strict=True
            ):
                part = slice(end - length, end)
                found[
                    source, line, stored.tokens[part].tobytes(), stored.supervised[part].tobytes()
                ] += 1
    assert found == Counter(
        (each.source, each.line, each.tokens.tobytes(), each.supervised.tobytes())
        for each in samples
    )


@CASES
@given(
    packs=st.integers(1, 500),
    seed=st.integers(-3, 3),
    group=st.integers(1, 70),
    consumed=st.integers(0, 10**12),
    ranks=st.sampled_from([1, 2, 3, 8]),
    more_ranks=st.sampled_from([1, 2, 3, 8]),
    stop=st.integers(0, 10),
)
def test_the_order_depends_on_seed_and_position_alone(
    packs, seed, group, consumed, ranks, more_ranks, stop
):
    """Stopped after any number of steps, and resumed by any other number of ranks, the packs
    and their order are the same.
    """
    plan = Plan(num_packs=packs, seed=seed, group=group)
    step = 24  # packs of a step; a multiple of every number of ranks
    whole = plan.pack_ids(consumed, 10 * step)
    seen = []
    for start, steps, size in (
        (consumed, stop, ranks),
        (consumed + stop * step, 10 - stop, more_ranks),
    ):
        shares = [
            plan.at(np.arange(start + rank, start + steps * step, size)) for rank in range(size)
        ]
        seen += np.stack(shares, axis=1).ravel().tolist()
    assert seen == whole.tolist()
    epoch = consumed // packs
    assert np.array_equal(np.sort(plan.pack_ids(epoch * packs, packs)), np.arange(packs))
