"""A dense model that is upcycled to a mixture of experts computes what it computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megavlm.convert.hf import convert
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.upcycle import Upcycling
from tests.convert.hf.test_peft import load, logits, make_base
from tests.convert.models import KINDS
from tests.convert.tool import run_tool


@pytest.mark.parametrize("kind", ["qwen3", "qwen3 tied"])
def test_the_logits_are_those_of_the_dense_model(tmp_path: Path, kind: str) -> None:
    dense = make_base(tmp_path / "dense", KINDS[kind])
    options = ("--upcycle_experts", "4", "--upcycle_topk", "2")
    for name, more in (("one", ()), ("other", ("--upcycle_seed", "7"))):
        out = str(tmp_path / name)
        assert run_tool("import", "--hf", str(dense), "--out", out, *options, *more) == 0
    convert.export(tmp_path / "one", tmp_path / "mixture")
    convert.export(tmp_path / "other", tmp_path / "seeded")
    found = architecture_from_hf(tmp_path / "mixture").language
    assert (found.family, found.num_experts, found.experts_per_token) == ("qwen3_moe", 4, 2)
    assert found.norm_topk_prob and found.expert_ffn_hidden_size == 56
    model = load(tmp_path / "mixture")
    wanted = logits(load(dense))
    assert (logits(model) - wanted).abs().max() < 1e-5 < 1e-2 < wanted.abs().max()
    # Tokens go to different experts, and another seed sends them elsewhere.
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("mixture", "seeded")
    )
    gates = [name for name in one if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3
    for name, weight in one.items():
        assert torch.equal(weight, other[name]) != (name in gates), name
    for name in gates:
        assert 0.015 < one[name].std() < 0.025


@pytest.mark.parametrize(
    ("kind", "experts", "topk", "told"),
    [
        ("qwen2", 4, 2, "--upcycle_experts 4: language models of the family qwen2 have no"),
        ("qwen3_moe", 4, 2, "the family qwen3_moe have no counterpart"),
        ("qwen3", 1, 2, "--upcycle_experts 1: must be 2 or more"),
        ("qwen3", 4, 1, "--upcycle_topk 1: must be from 2 to --upcycle_experts 4"),
        ("qwen3", 4, 5, "--upcycle_topk 5: must be from 2 to --upcycle_experts 4"),
    ],
)
def test_what_has_no_mixture_is_refused(kind: str, experts: int, topk: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Upcycling(experts=experts, topk=topk).architecture(KINDS[kind])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--upcycle_topk", "2"), "--upcycle_topk: no effect without --upcycle_experts"),
        (("--upcycle_experts", "4", "--peft", "."), "export them merged, and upcycle that"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: tuple[str, ...], told: str
) -> None:
    paths = ("--hf", str(tmp_path), "--out", str(tmp_path / "out"))
    assert run_tool("import", *paths, *options) == 2
    assert told in capsys.readouterr().err
