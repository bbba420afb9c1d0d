"""Gemma 2 in config.json: as it was published, what it cannot be, and the classes that leave its
final soft cap out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM

from megavlm.config.exports import HOLDS
from megavlm.config.models import MODELS
from megavlm.config.recipes.paligemma import ARCHITECTURE
from megavlm.config.schema import Architecture, Init
from megavlm.convert.hf import from_parts, language_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.planner.flops import pieces
from tests.convert import llava_models
from tests.convert.llava_models import make_llava
from tests.convert.models import BARE_GEMMA2, NATIVE_KINDS, make_hf
from tests.convert.part_folders import make_gemma_tokenizer, make_vision

GEMMA_2_27B = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}


def test_gemma_2_27b_is_read_as_it_was_published() -> None:
    assert list(language_config.problems(GEMMA_2_27B, "")) == []
    found = language_config.read(GEMMA_2_27B, tied_head=True)
    wanted = MODELS["paligemma2-28b"].language
    assert found == replace(wanted, vocab_size=256000)
    parts = ("language", "head")
    counted = [piece for piece in pieces(Architecture(language=found)) if piece.part in parts]
    assert sum(piece.elements for piece in counted) == 27_227_128_320
    no_caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    found = language_config.read(GEMMA_2_27B | no_caps, tied_head=True)
    assert (found.attention_softcap, found.final_softcap) == (0, 0)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("layer_types", ["full_attention"] * 46, "sliding_attention and full_attention by turns"),
        ("sliding_window", None, "sliding_window is missing"),
        ("query_pre_attn_scalar", 0, "query_pre_attn_scalar is 0"),
        ("attn_logit_softcapping", -1.0, "attn_logit_softcapping is -1.0"),
        ("final_logit_softcapping", "30", "final_logit_softcapping is '30'"),
        ("hidden_activation", "silu", "hidden_activation is 'silu'"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
    ],
)
def test_a_gemma_2_of_another_kind_is_refused(name: str, value: Any, told: str) -> None:
    [problem] = language_config.problems(GEMMA_2_27B | {name: value}, "text_config")
    assert problem.startswith("text_config.") and told in problem
    settings = dict(GEMMA_2_27B)
    del settings["query_pre_attn_scalar"]
    assert any("query_pre_attn_scalar" in one for one in language_config.problems(settings, ""))


LLAVA = replace(llava_models.SMALL, language=replace(llava_models.SMALL.language, **BARE_GEMMA2))


@pytest.mark.parametrize(
    ("dialect", "make", "architecture"),
    [("native", make_hf, NATIVE_KINDS["gemma2"]), ("llava", make_llava, LLAVA)],
)
def test_a_class_that_caps_no_logits_is_read_as_one_and_holds_no_cap(
    tmp_path: Path, dialect: str, make: Any, architecture: Architecture
) -> None:
    folder = make(tmp_path / "hf", architecture)
    settings = read_json(folder / "config.json")
    assert settings["text_config"]["final_logit_softcapping"] is None
    settings["text_config"]["final_logit_softcapping"] = 30.0  # which the class computes nothing of
    write_json(folder / "config.json", settings)
    assert architecture_from_hf(folder) == architecture
    assert list(HOLDS[dialect](architecture)) == []
    capped = replace(architecture, language=replace(architecture.language, final_softcap=30.0))
    [reason] = HOLDS[dialect](capped)
    assert "--architecture.language.final_softcap 0; this model has 30.0" in reason


def test_a_paligemma_2_starts_from_siglip_and_gemma_2(tmp_path: Path) -> None:
    config = Gemma2Config(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=259,
        query_pre_attn_scalar=9,
        final_logit_softcapping=7.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    make_gemma_tokenizer(tmp_path / "gemma2")
    vision = make_vision(tmp_path / "siglip", "siglip")
    init = Init(vision=str(vision), language=str(tmp_path / "gemma2"))
    found = from_parts.read_model("", init, ARCHITECTURE)
    language = found.language
    assert (language.family, language.query_pre_attn_scalar) == ("gemma2", 9)
    assert (language.window_size, language.attention_softcap) == (4096, 50.0)
    assert language.final_softcap == 7.0 and language.tied_head and found.prefix_lm
    # Formats that have no final soft cap take a model that is trained without it.
    uncapped = replace(language, final_softcap=0.0)
    from_parts.refuse_other(init, replace(found, language=uncapped))
    with pytest.raises(ValueError, match="attention_softcap: 50.0 there, 9.0 asked for"):
        wrong = replace(language, attention_softcap=9.0)
        from_parts.refuse_other(init, replace(found, language=wrong))
