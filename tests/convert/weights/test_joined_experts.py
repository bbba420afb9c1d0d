"""Experts that a file holds together, and weights in MXFP4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megavlm.convert.hf import convert
from megavlm.convert.weights.joined_experts import CutExperts, JoinedExperts, from_mxfp4
from megavlm.convert.weights.views import Header
from tests.convert.models import GPT_OSS, SMALL, make_hf

STEM = "language_model.model.layers.1.mlp.experts"
# Sizes that blocks of 32 numbers divide.
MODEL = replace(
    SMALL,
    language=replace(
        SMALL.language,
        **GPT_OSS | dict(ffn_hidden_size=32, expert_ffn_hidden_size=32, num_experts=3),
        hidden_size=64,
        num_layers=2,
        kv_channels=10,
    ),
)


def packed(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return random blocks and scales of weights [E, R, C]."""
    experts, rows, columns = shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (experts, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales


def test_mxfp4_is_that_of_transformers_bit_for_bit() -> None:
    torch.manual_seed(0)
    blocks, scales = packed((2, 96, 64))
    blocks[0, :16, 0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales[0, 20] = torch.tensor([0, 1], dtype=torch.uint8)
    scales[0, 21] = torch.tensor([254, 255], dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    for expert in range(2):
        found = from_mxfp4(blocks[expert], scales[expert])
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), expected[expert].view(torch.int16))


def test_a_foreign_folder_in_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = make_hf(tmp_path / "hf", MODEL)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    expected = {}
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = packed((experts, outputs, inputs))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    assert len(expected) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    config.write_text(json.dumps(settings))
    assert convert.architecture_from_hf(folder) == MODEL
    view = convert.hf_tensors_as_megatron(folder, MODEL)
    [fused] = [one for name, one in expected.items() if "layers.1." in name and "gate" in name]
    [down] = [one for name, one in expected.items() if "layers.1." in name and "down" in name]
    for expert in range(3):
        key = f"language.decoder.layers.1.mlp.experts.{expert}"
        first = view[f"{key}.linear_fc1.weight"]
        assert torch.equal(first[:32], fused[expert][:, ::2].T), "gates"
        assert torch.equal(first[32:], fused[expert][:, 1::2].T), "the other halves"
        assert torch.equal(view[f"{key}.linear_fc2.weight"], down[expert].T)


class _Tensors(dict):
    """Tensors in memory."""

    @property
    def headers(self) -> dict[str, Header]:
        return {name: Header(tuple(one.shape), one.dtype) for name, one in self.items()}


def test_cutting_and_joining_are_inverse() -> None:
    found = _Tensors(
        {
            "head": torch.randn(3),
            f"{STEM}.gate_up_proj": torch.randn(12, 4, 10),
            f"{STEM}.gate_up_proj_bias": torch.randn(12, 10),
            f"{STEM}.down_proj": torch.randn(12, 5, 4),
            f"{STEM}.down_proj_bias": torch.randn(12, 4),
        }
    )
    cut = CutExperts(found)
    assert len(cut.headers) == 1 + 12 * 4
    assert cut.headers[f"{STEM}.2.down_proj"].shape == (5, 4)
    joined = JoinedExperts(cut)
    assert joined.headers == found.headers
    assert all(torch.equal(joined[name], one) for name, one in found.items())
    in_order_of_text = JoinedExperts(_Tensors({name: cut[name] for name in sorted(cut.headers)}))
    assert all(torch.equal(in_order_of_text[name], one) for name, one in found.items())


def test_half_of_a_weight_in_4_bits_is_refused() -> None:
    blocks, scales = packed((2, 4, 32))
    bias = {f"{STEM}.down_proj_bias": torch.zeros(2, 4)}
    for half in ({f"{STEM}.down_proj_blocks": blocks}, {f"{STEM}.down_proj_scales": scales}):
        with pytest.raises(ValueError, match=r"down_proj_\w+ is there, and .* is missing"):
            CutExperts(_Tensors(bias | half))
    both = {f"{STEM}.down_proj_blocks": blocks, f"{STEM}.down_proj_scales": scales[:, :3]}
    with pytest.raises(ValueError, match=r"must be \[.., n, 16\] and \[.., n\]"):
        CutExperts(_Tensors(bias | both))
