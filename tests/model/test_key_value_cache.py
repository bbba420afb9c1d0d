"""Attention of new tokens over keys that were kept, against attention over whole samples, with the
heads of real models.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megavlm.model.attention import PackedAttention, PackedSamples
from megavlm.model.cached_attention import caching
from megavlm.model.key_value_cache import Decode, KeyValueCache, Prefill, slots_for
from megavlm.model.sink_attention import SinkAttention
from tests.model.test_sink_attention import _Alone

CPU = torch.device("cpu")
ROOM = 6
PROMPTS = {3: 150, 7: 9, 5: 1, 8: 40, 1: 33}
HEADS = {
    "InternVL2.5-1B": (PackedAttention, 14, 2, 64, 0),
    "InternVL2.5-8B": (PackedAttention, 32, 8, 128, 0),
    "PaliGemma": (PackedAttention, 8, 1, 256, 0),
    "OPT-2.7B": (PackedAttention, 32, 32, 80, 0),
    "GPT-OSS, window": (SinkAttention, 64, 8, 64, 128),
    "GPT-OSS, no window": (SinkAttention, 64, 8, 64, 0),
}


def _layer(kind: type, heads: int, size: int, window: int) -> nn.Module:
    config = SimpleNamespace(
        kv_channels=size,
        window_size=(window - 1, 0) if window else None,
        window_attn_skip_freq=None,
        num_attention_heads=heads,
        params_dtype=torch.float32,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = _Alone()
    found = caching(kind, has_sinks=kind is SinkAttention)(
        config=config, layer_number=1, pg_collection=groups
    )
    if kind is SinkAttention:
        found.softmax_offset.data = torch.randn(heads)
    return found.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_new_tokens_attend_as_in_whole_samples(name: str) -> None:
    torch.manual_seed(0)
    kind, heads, groups, size, window = HEADS[name]
    layer = _layer(kind, heads, size, window)
    lengths = np.array([length + ROOM for length in PROMPTS.values()])
    ends = np.append(0, np.cumsum(lengths))
    starts = dict(zip(PROMPTS, ends[:-1].tolist(), strict=True))
    query, key, value = (torch.randn(ends[-1], count, size) for count in (heads, groups, groups))

    def attend(query, key, value, cached):
        sizes = tuple(lengths.tolist())
        samples = PackedSamples(
            qkv_format="thd", query_lengths=sizes, key_lengths=sizes, cached=cached
        )
        return layer(query, key, value, packed_seq_params=samples)

    whole = attend(query, key, value, None)
    cache = KeyValueCache(PROMPTS, ROOM, CPU)
    assert sum(len(group.questions) * group.width for group in cache.groups) <= sum(
        slots_for(length + ROOM) for length in PROMPTS.values()
    )
    packs = (list(PROMPTS)[:3], list(PROMPTS)[3:])  # what another pack kept is not touched
    for questions in packs:
        own = {one: starts[one] for one in questions}
        kept = attend(query, key, value, Prefill(cache, own, ends, {}))
        assert torch.equal(kept, whole)
    for step in range(ROOM - 1):
        if step == 2:
            cache.keep({3, 5, 8})
        if step == 4:
            cache.keep({8})
        new = Decode(cache, 4)
        assert len(new.positions) % 4 == 0
        rows = [starts[one] + PROMPTS[one] + step for one in new.questions]
        assert new.positions[: len(rows)].tolist() == [PROMPTS[q] + step for q in new.questions]
        padded = torch.tensor(rows + [0] * (len(new.positions) - len(rows)))
        found = attend(query[padded], key[padded], value[padded], new)
        assert (found[: len(rows)] - whole[rows]).abs().max() < 1e-5
        assert not found[len(rows) :].any()
    assert new.questions == [8]


def test_new_tokens_are_rotated_behind_what_images_take() -> None:
    cache = KeyValueCache(PROMPTS, ROOM, CPU, {3: -40, 8: -7})
    for step in range(2):
        new = Decode(cache, 4)
        where = dict(zip(new.questions, new.rotary_positions.T.tolist(), strict=False))
        assert where[3] == [110 + step] * 3 and where[8] == [33 + step] * 3
        assert where[7] == [9 + step] * 3
        assert new.rotary_positions.shape == (3, 8)


def test_a_cache_without_questions_has_a_row_of_padding() -> None:
    new = Decode(KeyValueCache({}, 0, CPU), 6)
    assert new.questions == [] and len(new.positions) == 6
    layer = _layer(PackedAttention, 4, 8, 0)
    samples = PackedSamples(qkv_format="thd", cached=new)
    found = layer(*(torch.ones(6, 4, 8) for _ in range(3)), packed_seq_params=samples)
    assert found.shape == (6, 32) and not found.any()
