"""Transformer Engine's layers compute what local layers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavlm.data.loading.batch import BatchOptions
from megavlm.parallel import backend
from tests.gpu.models import CAPACITY, LANGUAGES, SMALL, small
from tests.ranks.runs import EVERYTHING


def gradients(built) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute the loss of the first two packs, and its gradient."""
    from megavlm.model.precision import tile_multiple
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    layers = SMALL.vision.num_layers
    multiple = tile_multiple(built.config)
    packs = [
        built.train.batch(pack, pack, BatchOptions(vision_layers=layers, tile_multiple=multiple))
        for pack in range(2)
    ]
    built.ddp_chunks[0].zero_grad_buffer()
    step = Microbatches(iter(packs), 2, sum(pack.weight_sum for pack in packs))
    loss = run_packs(built.ddp_chunks, step, built.backend)
    return float(loss), {
        key: weight.main_grad.float().cpu()
        for key, weight in named_weights(built.chunks[0]).items()
        if weight.requires_grad
    }


def distance(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the difference, as a share of the exact gradient's."""
    return float((gradient - exact).norm() / exact.norm().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("language", "recompute"),
    [
        ("Qwen2", "none"),
        ("Qwen2", "selective"),
        ("Qwen2", "full"),
        ("experts", "none"),
        ("experts", "selective"),
        ("GPT-OSS", "none"),
        ("GPT-OSS", "selective"),
        ("Gemma 2", "none"),
    ],
)
def test_loss_and_gradients_are_as_near_to_float32_as_those_of_local_layers(
    job, dataset: Path, language: str, recompute: str
) -> None:
    # Where two experts come close, rounding sends some tokens to another one.
    slack = 0.1 if "num_experts" in LANGUAGES[language] else 0.02
    answers = {}
    for name, settings in {
        "exact": dict(kernels="local", precision="float32"),
        "local": dict(kernels="local"),
        "engine": dict(kernels="transformer_engine", recompute=recompute),
    }.items():
        with job(small(dataset, language, drop_path=0.2, **settings)) as built:
            answers[name] = gradients(built)
    (exact_loss, exact) = answers["exact"]
    (local_loss, local) = answers["local"]
    (engine_loss, engine) = answers["engine"]
    assert local_loss == pytest.approx(exact_loss, rel=5e-3) and engine_loss == pytest.approx(
        exact_loss, rel=5e-3
    )
    assert engine.keys() == exact.keys()
    for key in exact:
        assert distance(engine[key], exact[key]) < 2 * distance(local[key], exact[key]) + slack, key


def test_packed_attention_sees_one_sample_at_a_time() -> None:
    from megavlm.model.attention import PackedAttention, PackedSamples
    from megavlm.model.kernels import transformer_engine_kernels
    from megavlm.model.transformer import language_config
    from megavlm.parallel import process_groups
    from megavlm.planner.layout import make_layout

    config = small(Path("unused"), kernels="transformer_engine")
    device_backend = backend.start(5)
    kernels = transformer_engine_kernels()
    groups = process_groups.create(config.parallel, 0)
    try:
        from megatron.core.transformer.enums import AttnMaskType

        settings = language_config(config, make_layout(config), kernels)
        attention = kernels.packed_attention(
            config=settings,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=groups.collection,
        )
        torch.manual_seed(0)
        lengths = (7, 293, 1, 339, CAPACITY - 640)
        ends = torch.tensor(
            [0, 7, 300, 301, 640, CAPACITY], dtype=torch.int32, device=device_backend.device
        )
        packed = PackedSamples(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=384,
            max_seqlen_kv=384,
            query_lengths=lengths,
            key_lengths=lengths,
        )
        draw = dict(device=device_backend.device, dtype=torch.bfloat16, requires_grad=True)
        query = torch.randn(CAPACITY, 4, 64, **draw)
        key, value = (torch.randn(CAPACITY, 2, 64, **draw) for _ in range(2))
        found = attention(
            query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed
        )
        inputs = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
        expected = PackedAttention()(*inputs, packed_seq_params=packed)
        torch.testing.assert_close(found.float().view_as(expected), expected, atol=2e-2, rtol=2e-2)
        found.float().square().sum().backward()
        expected.square().sum().backward()
        for tensor, exact in zip((query, key, value), inputs, strict=True):
            assert distance(tensor.grad.float(), exact.grad) < 0.03
    finally:
        process_groups.destroy()


@pytest.mark.parametrize(
    "trainable",
    [
        ("connector",),
        ("vision", "connector"),
        ("language",),
        EVERYTHING,
        ("vision.encoder.layers.2",),
    ],
)
def test_a_freeze_mask_trains_what_it_says_and_nothing_else(
    job, dataset: Path, trainable: tuple[str, ...]
) -> None:
    from megavlm.model.freeze import matches
    from megavlm.model.weights import named_weights
    from megavlm.train.optimizer import (
        prepare_gradient,
        set_rates,
        update_weights,
        whole_weights,
    )

    with job(small(dataset, kernels="transformer_engine", trainable=trainable)) as built:
        before = {
            key: weight.detach().clone() for key, weight in named_weights(built.chunks[0]).items()
        }
        _, found = gradients(built)
        set_rates(built.optimizer, built.config, 5)
        update_weights(
            built.optimizer,
            prepare_gradient(built.optimizer, built.part_norms.sums, built.backend.device),
            1.0,
        )
        with whole_weights(built.ddp_chunks):
            after = named_weights(built.chunks[0])
            for key, weight in after.items():
                trains = any(matches(key, pattern) for pattern in trainable)
                assert (key in found) == trains, key
                assert trains or torch.equal(weight, before[key]), key
            assert any(not torch.equal(after[key], before[key]) for key in found)
