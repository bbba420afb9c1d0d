"""Whole models, there and back, and the command-line tool."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from megavlm.checkpoint import step_folder, train_state
from megavlm.config.cli import from_yaml
from megavlm.config.schema import Architecture, Connector
from megavlm.convert.hf import convert
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from tests.convert.models import (
    NATIVE_KINDS,
    SMALL,
    TOKENIZER,
    as_native,
    language,
    load_all,
    make_hf,
)
from tests.convert.tool import run_tool


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, kind: str) -> None:
    source = make_hf(tmp_path / "hf", NATIVE_KINDS[kind], shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    checkpoint = convert.import_(source, tmp_path / "checkpoint")
    out = convert.export(checkpoint, tmp_path / "out")
    before = load_all(source)
    after = load_all(out)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
        for name in before
    )
    assert (
        architecture_from_hf(out)
        == as_native(NATIVE_KINDS[kind])
        == from_yaml(checkpoint / "config.yaml").architecture
    )


def test_parts_of_several_dtypes_survive_an_import(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = make_hf(tmp_path / "hf")
    weights = load_all(source)
    half = [name for name in weights if "v_proj.weight" in name or "up_proj" in name]
    assert len(half) == 3 + 3 + 2
    weights |= {name: torch.full(weights[name].shape, 0.29).half() for name in half}
    wide = "language_model.model.layers.1.self_attn.q_proj.weight"
    weights[wide] = weights[wide].float() + 1e-4
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    exported = convert.export(convert.import_(source, tmp_path / "start"), tmp_path / "out")
    after = load_all(exported)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name].double(), weights[name].double()) for name in weights)
    # The dtype in config.json is that of most weights, not that of a tensor that is stored first.
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    capsys.readouterr()
    assert run_tool("check", "--hf", str(source)) == 0
    told = capsys.readouterr().out
    assert f"same values in a wider dtype: {half[0]}" in told and "changed" not in told
    served = convert.full_tensors(source, SMALL)(
        "language.decoder.layers.1.mlp.linear_fc1.weight", (112, 48)
    )
    assert torch.equal(served[60:100, :], torch.full((40, 48), 0.29).half().float())


def test_transformers_loads_an_export_without_a_name_lost(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    out = convert.export(
        convert.import_(source, tmp_path / "checkpoint"), tmp_path / "out", dtype=torch.float32
    )
    model, info = InternVLForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = InternVLForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32
    ).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.image_seq_length == SMALL.features_per_tile
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (
        model.config.image_token_id
        == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        == tokenizer.context_image_token_id
    )
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_biases_of_routers_keep_float32(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", NATIVE_KINDS["dots1"])
    weights = load_all(source)
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    assert biases
    weights |= {name: weights[name].float() + 1e-4 for name in biases}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    start = convert.import_(source, tmp_path / "start")
    after = load_all(convert.export(start, tmp_path / "out", dtype=torch.float16))
    assert all(torch.equal(after.pop(name), weights[name]) for name in biases)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_the_tokenizer_stays_the_same_and_renders_the_template(tmp_path: Path) -> None:
    checkpoint = convert.import_(make_hf(tmp_path / "hf"), tmp_path / "checkpoint")
    out = convert.export(checkpoint, tmp_path / "out")
    again = convert.import_(out, tmp_path / "again")
    expected = fingerprint(load_tokenizer(TOKENIZER))
    assert (
        train_state.read(checkpoint)
        == train_state.read(again)
        == train_state.State(tokenizer=expected)
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert fingerprint(tokenizer) == expected
    assert (
        tokenizer.start_image_token,
        tokenizer.end_image_token,
        tokenizer.context_image_token,
    ) == ("<img>", "</img>", "<IMG_CONTEXT>")
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    ours, _ = ChatTemplate(load_tokenizer(TOKENIZER), 4).encode(
        [Turn(role="human", text="How many?"), Turn(role="gpt", text="Three.")], []
    )
    assert tokenizer.apply_chat_template(chat, return_dict=False) == ours.tolist()


def test_a_system_message_of_ones_own_survives_the_template(tmp_path: Path) -> None:
    message = "It's \\ here:\n{{ nothing }}"
    tokenizer = load_tokenizer(TOKENIZER)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}],
        chat_template=chat_format("internvl2_5").hf_template(system_message=message),
        tokenize=False,
    )
    assert text == f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"


def test_weights_are_served_to_the_trainer(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    served = convert.full_tensors(source, SMALL)
    weights = load_all(source)
    padded = served("language.output_layer.weight", (512, 48))[:, :]
    assert torch.equal(padded, weights["language_model.lm_head.weight"])
    layer = "language_model.model.layers.2.mlp."
    gate_up = torch.cat([weights[f"{layer}gate_proj.weight"], weights[f"{layer}up_proj.weight"]])
    assert torch.equal(
        served("language.decoder.layers.2.mlp.linear_fc1.weight", (112, 48))[:, :], gate_up
    )


@pytest.mark.parametrize(
    "place",
    [
        (slice(0, 16), slice(None)),
        (slice(13, 61),),
        (slice(None), slice(5, 30)),
        (slice(0, 0), slice(None)),
    ],
)
def test_a_share_of_a_tensor_is_that_share_of_the_whole(
    tmp_path: Path, place: tuple[slice, ...]
) -> None:
    view = convert.hf_tensors_as_megatron(make_hf(tmp_path / "hf"), SMALL)
    for key in (
        "language.decoder.layers.1.self_attention.linear_qkv.weight",
        "language.decoder.layers.0.mlp.linear_fc1.weight",
    ):
        assert torch.equal(view.part(key, place), view[key][place])


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, language=replace(SMALL.language, num_query_groups=3)),
        replace(SMALL, connector=Connector(pixel_shuffle=1)),
    ],
)
def test_another_model_than_asked_for_is_refused(tmp_path: Path, other: Architecture) -> None:
    source = make_hf(tmp_path / "hf")
    with pytest.raises(
        ValueError,
        match=(
            r"of another architecture than --model:\n  --architecture\.\S+: 2 there, \d asked for"
        ),
    ):
        convert.full_tensors(source, other)


def test_names_that_transformers_uses_in_memory_are_read(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    model = InternVLForConditionalGeneration.from_pretrained(source)
    before = load_all(source)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    assert load_file(source / "model.safetensors").keys().isdisjoint(before)
    after = load_all(
        convert.export(convert.import_(source, tmp_path / "checkpoint"), tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def test_a_head_of_its_own_must_be_there(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    weights = load_all(source)
    head = weights.pop("language_model.lm_head.weight")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"language_model.lm_head.weight: missing"):
        convert.check(source)
    # Many files say that the head is tied, since transformers thinks so where nothing is said, and
    # hold one all the same.
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    assert architecture_from_hf(source).language.tied_head
    save_file(weights | {"language_model.lm_head.weight": head}, source / "model.safetensors")
    assert not architecture_from_hf(source).language.tied_head


def test_a_tied_head_may_start_a_model_with_two(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", NATIVE_KINDS["qwen2 tied"])
    assert "language_model.lm_head.weight" not in load_all(source)
    tensor = convert.full_tensors(source, SMALL)
    head, embedding = (
        tensor(f"language.{key}.weight", (461, 48))[:, :]
        for key in ("output_layer", "embedding.word_embeddings")
    )
    assert torch.equal(head, embedding)
    with pytest.raises(ValueError, match="tied_head: False there, True asked for"):
        convert.full_tensors(make_hf(tmp_path / "untied"), language(tied_head=True))


def test_an_imported_checkpoint_has_no_stage_and_the_newest_format(tmp_path: Path) -> None:
    checkpoint = step_folder.read(convert.import_(make_hf(tmp_path / "hf"), tmp_path / "start"))
    assert not checkpoint.config.stage and checkpoint.state.stage is None
    assert checkpoint.state.format == train_state.FORMAT_VERSION


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer.json").unlink()
    checkpoint = convert.import_(source, tmp_path / "checkpoint")
    assert json.loads((checkpoint / "state.json").read_text())["tokenizer"] is None
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        convert.export(checkpoint, tmp_path / "out")
    assert convert.export(checkpoint, tmp_path / "out", tokenizer=TOKENIZER).is_dir()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    few = replace(SMALL, language=replace(SMALL.language, vocab_size=450))
    checkpoint = convert.import_(make_hf(tmp_path / "hf", few), tmp_path / "checkpoint")
    with pytest.raises(
        ValueError, match="has ids up to 456, and the model's vocabulary has 450 rows"
    ):
        convert.export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tool_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = make_hf(tmp_path / "hf")
    run = tmp_path / "run"
    assert run_tool("import", "--hf", str(source), "--out", str(run / "step_00000000")) == 0
    (run / "latest").write_text("step_00000000\n")
    assert (
        run_tool("export", "--load", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32")
        == 0
    )
    assert {tensor.dtype for tensor in load_all(tmp_path / "out").values()} == {torch.float32}
    assert run_tool("check", "--hf", str(source)) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in lines] == [
        "part",
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    ]
    assert all(line.endswith("yes") for line in lines[1:])


def test_the_tool_says_what_is_wrong_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = make_hf(tmp_path / "hf")
    assert run_tool("import", "--hf", str(source), "--out", str(tmp_path)) == 2
    assert f"--out {tmp_path}: exists" in capsys.readouterr().err
    assert run_tool("export", "--load", str(tmp_path), "--out", str(tmp_path / "out")) == 2
    assert "no checkpoint is there" in capsys.readouterr().err
    assert run_tool("export", "--load", str(tmp_path / "none"), "--out", str(tmp_path / "out")) == 2
    assert "--load: " + str(tmp_path / "none: no such folder") in capsys.readouterr().err
    assert run_tool("check", "--hf", str(tmp_path)) == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_experts_that_a_file_holds_as_one_tensor_are_read(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", NATIVE_KINDS["qwen3_moe"])
    weights = load_all(source)
    fused = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in range(3):
        stem = f"language_model.model.layers.{layer}.mlp.experts"
        first, second = (
            [
                torch.cat([weights[f"{stem}.{expert}.{part}.weight"] for part in parts])
                for expert in range(5)
            ]
            for parts in (("gate_proj", "up_proj"), ("down_proj",))
        )
        fused[f"{stem}.gate_up_proj"] = torch.stack(first)
        fused[f"{stem}.down_proj"] = torch.stack(second)
    save_file(fused, source / "model.safetensors", {"format": "pt"})
    exported = convert.export(convert.import_(source, tmp_path / "start"), tmp_path / "out")
    after = load_all(exported)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    part = convert.full_tensors(source, NATIVE_KINDS["qwen3_moe"])(
        "language.decoder.layers.1.mlp.experts.3.linear_fc1.weight", (40, 48)
    )[15:25, :]
    expected = weights["language_model.model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert torch.equal(part[:5], expected[15:20])
