"""Gemma's norms and embeddings against those of ``transformers``, also in bfloat16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from megavlm.model.norm import Norm, scaled_rms_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_that_adds_one_to_its_weight_is_gemmas(dtype: torch.dtype) -> None:
    config = SimpleNamespace(
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        params_dtype=dtype,
        sequence_parallel=False,
    )
    ours = Norm(config, 48, 1e-6)
    theirs = GemmaRMSNorm(48, 1e-6).to(dtype)
    generator = torch.Generator().manual_seed(1)
    # Weights that 1 + weight in bfloat16 would lose.
    weight = torch.randn(48, generator=generator) * 1e-3
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    hidden = torch.randn(5, 1, 48, generator=generator).to(dtype)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=0, atol=1e-6)
    of_heads = scaled_rms_norm(hidden, ours.weight, 1e-6, True)
    assert torch.equal(of_heads, ours(hidden)), "cross-attention calls it with split weights"
