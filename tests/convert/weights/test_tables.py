"""The table of weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megavlm.config.lora import Lora, stacked
from megavlm.config.models import MODELS
from megavlm.config.schema import Architecture
from megavlm.convert.hf import native_config
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.adapters import adapted_rows
from megavlm.convert.weights.families import FAMILIES, family_of
from megavlm.convert.weights.tables import (
    Dialect,
    head_names,
    name_on_disk,
    rows,
)
from tests.convert.blip2_models import OPT
from tests.convert.fuyu_models import SMALL as FUYU
from tests.convert.models import KINDS, NATIVE_KINDS, language
from tests.convert.qwen_vl_models import SMALL as QWEN2_5_VL
from tests.convert.qwen_vl_models import SMALL_2 as QWEN2_VL
from tests.convert.qwen_vl_models import SMALL_3 as QWEN3_VL

INTERNVL = {name: one for name, one in MODELS.items() if one.image_tokens == "internvl"}


def transformers_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    settings = native_config.write(
        architecture, TokenIds(image=90, begin=0, end=1, pad=2), torch.bfloat16
    )
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(settings))
    shapes = {
        name_on_disk(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    for name in [name for name in shapes if ".mlp.experts." in name]:
        # In memory the experts of a layer are one tensor, in files each is by itself.
        stem, _, matrix = name.rpartition(".")
        experts, *shape = shapes.pop(name)
        if architecture.language.linear_bias:  # GPT-OSS: the table has parts of one tensor
            of_each = {f"{stem}.{expert}.{matrix}": tuple(shape) for expert in range(experts)}
            shapes |= of_each
            continue
        rows, columns = shape
        for expert in range(experts):
            if matrix == "down_proj":
                shapes[f"{stem}.{expert}.down_proj.weight"] = (rows, columns)
            else:
                for part in ("gate_proj", "up_proj"):
                    shapes[f"{stem}.{expert}.{part}.weight"] = (rows // 2, columns)
    if architecture.language.tied_head:
        del shapes[
            "language_model.lm_head.weight"
        ]  # the embedding once more, which files do not repeat
    return shapes


@pytest.mark.parametrize(
    "architecture",
    [*NATIVE_KINDS.values(), *INTERNVL.values()],
    ids=[*NATIVE_KINDS, *INTERNVL],
)
def test_names_and_shapes_are_those_of_transformers(architecture: Architecture) -> None:
    table = rows(architecture)
    pairs = [pair for row in table for pair in zip(row.names, row.part_shapes, strict=True)]
    assert len(pairs) == len(dict(pairs)) and len(table) == len({row.key for row in table})
    assert dict(pairs) == transformers_shapes(architecture)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dialects_have_the_same_tensors_of_megatron(kind: str) -> None:
    native, chat = (rows(KINDS[kind], dialect) for dialect in ("native", "chat"))
    assert [(row.key, row.shape) for row in native] == [(row.key, row.shape) for row in chat]
    for table in (native, chat):
        names = [name for row in table for name in row.names]
        assert len(names) == len(set(names))
        assert head_names().isdisjoint(names) == KINDS[kind].language.tied_head


def test_a_model_that_contradicts_its_family_is_refused_with_every_flag() -> None:
    with pytest.raises(
        ValueError,
        match=r"--architecture.language.family bert: no such family; known are qwen2, .*mistral",
    ):
        family_of(language(family="bert").language)
    with pytest.raises(
        ValueError,
        match=(
            "family qwen2: .*qkv_bias is false, must be true; .*qk_norm is true, must be false;"
            " .*kv_channels"
        ),
    ):
        family_of(language(qkv_bias=False, qk_norm=True, kv_channels=10).language)
    assert {family_of(kind.language).name for kind in NATIVE_KINDS.values()} == set(FAMILIES) - {
        "opt"
    }


def test_what_gemma_alone_has_is_refused_elsewhere_and_asked_of_gemma() -> None:
    with pytest.raises(ValueError, match=r"qwen2: .*scaled_embedding is true, must be false"):
        family_of(language(scaled_embedding=True).language)
    with pytest.raises(
        ValueError,
        match="gemma: .*activation is swiglu, must be geglu_tanh; .*zero_centered_norm is false",
    ):
        family_of(language(family="gemma", qkv_bias=False).language)


def test_the_chat_dialect_has_no_place_for_gemma() -> None:
    with pytest.raises(ValueError, match=r"InternVLChatModel has .* this model has gemma"):
        rows(NATIVE_KINDS["gemma"], "chat")


def test_operations_and_tables_need_neither_megatron_nor_transformers() -> None:
    code = (
        "import sys, megavlm.convert.weights.transforms, megavlm.convert.weights.tables\n"
        "print('megatron' in sys.modules)\n"
        "import megavlm.train.launch\n"  # which needs transformers for some runs alone
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 2


@pytest.mark.parametrize(
    ("architecture", "dialect"),
    [
        *((architecture, "native") for architecture in NATIVE_KINDS.values()),
        (OPT, "blip2"),
        (FUYU, "fuyu"),
        (QWEN2_VL, "qwen2_vl"),
        (QWEN2_5_VL, "qwen2_5_vl"),
        (QWEN3_VL, "qwen3_vl"),
    ],
    ids=[*NATIVE_KINDS, "BLIP-2 with OPT", "Fuyu", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"],
)
def test_each_weight_of_the_files_has_an_adapter(
    architecture: Architecture, dialect: Dialect
) -> None:
    language = "language"
    if architecture.language.linear_bias:  # adapters of its experts are refused
        language += ".*.self_attention"
    adapted = replace(architecture, lora=Lora(rank=2, targets=("vision", language)))
    table = list(adapted_rows(adapted, dialect))
    assert len(table) > architecture.language.num_layers
    for row in table:
        assert stacked(architecture, row.key) == len(row.names), row.key
