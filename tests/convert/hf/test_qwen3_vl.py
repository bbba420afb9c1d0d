"""What only Qwen3-VL has: settings of transformers 4, and experts of a layer as one tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import convert, qwen_vl_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.reference import load_reference
from megavlm.convert.weights.tables import rows
from tests.convert.models import ids_with, load_all
from tests.convert.qwen_vl_models import (
    MARKS,
    SMALL_3,
    SMALL_3_MOE,
    kind_of,
    make_qwen_vl,
    refuse,
    turn_experts,
)


def test_experts_as_transformers_has_them_in_memory_are_read(tmp_path: Path) -> None:
    source = make_qwen_vl(tmp_path / "hf", SMALL_3_MOE)
    everything = (slice(None),)
    served = convert.full_tensors(source, SMALL_3_MOE)
    table = [row for row in rows(SMALL_3_MOE, "qwen3_vl_moe") if ".mlp.experts." in row.key]
    before = {row.key: served(row.key, row.shape)[everything].clone() for row in table}
    turn_experts(source)
    assert set(load_reference(source).state_dict()) == set(load_all(source))
    assert not any(part.changed for part in convert.check(source))
    served = convert.full_tensors(source, SMALL_3_MOE)
    for row in table:
        assert torch.equal(served(row.key, row.shape)[everything], before[row.key]), row.key


@pytest.mark.parametrize("architecture", [SMALL_3, SMALL_3_MOE], ids=["3", "experts"])
def test_a_config_of_transformers_4_is_read(tmp_path: Path, architecture: Architecture) -> None:
    source = make_qwen_vl(tmp_path / "hf", architecture)
    settings = read_json(source / "config.json")
    text = settings["text_config"]
    rotary = text.pop("rope_parameters")
    assert rotary["mrope_interleaved"] is True
    text |= {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": rotary}
    if architecture.language.num_experts:
        text |= {
            "num_experts": text.pop("num_local_experts"),
            "norm_topk_prob": False,
        }  # which the class does not read
    settings["vision_config"]["model_type"] = settings["model_type"]
    del settings["vision_config"]["rope_parameters"]
    write_json(source / "config.json", settings)
    assert architecture_from_hf(source) == architecture


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("vision_config", {"num_position_embeddings": 8}, "position_embeddings is 8, must be a sq"),
        (
            "vision_config",
            {"deepstack_visual_indexes": [2, 0]},
            r"visual_indexes is \[2, 0\], must be layers from 0 to 2, each once, in their order",
        ),
        (
            "vision_config",
            {"deepstack_visual_indexes": [3]},
            r"is \[3\], must be layers from 0 to 2",
        ),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act is 'silu', must be one of gelu,"),
        ("text_config", {"attention_bias": True}, "attention_bias is True, must be False"),
        ("text_config", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], must be \[\]"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "default", "mrope_interleaved": False}},
            "rope_parameters.mrope_interleaved is False, must be True",
        ),
    ],
)
def test_other_models_of_the_third_are_refused(
    tmp_path: Path, section: str, change: dict, told: str
) -> None:
    refuse(tmp_path / "hf", SMALL_3_MOE, section, change, told)


def test_other_programs_are_told_that_rotations_take_turns() -> None:
    kind = kind_of(SMALL_3)
    settings = qwen_vl_config.write(kind, SMALL_3, MARKS, ids_with(7), torch.bfloat16)
    for name in ("rope_scaling", "rope_parameters"):
        found = settings["text_config"][name]
        assert found["mrope_interleaved"] is True and found["mrope_section"] == [2, 2, 2]


@pytest.mark.parametrize("size", [24, 48])
def test_experts_that_transformers_cannot_tell_around_are_refused(size: int) -> None:
    language = dataclasses.replace(SMALL_3_MOE.language, expert_ffn_hidden_size=size)
    model = dataclasses.replace(SMALL_3_MOE, language=language)
    with pytest.raises(ValueError, match=f"no squares; this model has .* {size} and hidden_size 4"):
        rows(model, "qwen3_vl_moe")
