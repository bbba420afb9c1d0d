"""The chat dialect, in which OpenGVLab publishes its models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from megavlm.config.cli import from_yaml
from megavlm.convert.hf import chat_config, convert
from megavlm.convert.hf.hub_formats import dialect_of
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.reference import load_reference
from megavlm.convert.hf.token_ids import TextIds
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from tests.convert.chat import chat_settings, make_chat, same_tensors, with_head
from tests.convert.models import KINDS, SMALL, TOKENIZER, as_native, load_all, make_hf
from tests.convert.tokenizer_kinds import published_internlm2


def chat_folder(folder: Path, kind: str = "qwen2") -> Path:
    return make_chat(make_hf(folder / "native", KINDS[kind]), folder / "chat", KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_is_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(chat_settings(KINDS[kind])))
    assert architecture_from_hf(tmp_path) == KINDS[kind] and dialect_of(tmp_path) == "chat"


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical_in_both_dialects(tmp_path: Path, kind: str) -> None:
    chat = chat_folder(tmp_path, kind)
    checkpoint = convert.import_(chat, tmp_path / "checkpoint")
    assert from_yaml(checkpoint / "config.yaml").architecture == KINDS[kind]
    again = convert.export(checkpoint, tmp_path / "again", dialect="chat")
    native = convert.export(checkpoint, tmp_path / "out", dialect="native")
    assert same_tensors(native, tmp_path / "native")
    assert architecture_from_hf(native) == as_native(KINDS[kind])
    # OpenGVLab's code knows Mistral as a Llama, and unties every head.
    family = {"mistral": "llama"}.get(kind, KINDS[kind].language.family)
    language = replace(KINDS[kind].language, family=family, tied_head=False)
    assert architecture_from_hf(again) == replace(KINDS[kind], language=language)
    if KINDS[kind].language.tied_head:
        before = with_head(chat)
        after = load_all(again)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    else:
        assert same_tensors(again, chat)


def test_native_to_chat_to_native_is_bit_identical(tmp_path: Path) -> None:
    for kind in ("InternViT-6B", "qwen3"):
        native = make_hf(tmp_path / kind, KINDS[kind])
        chat = convert.export(
            convert.import_(native, tmp_path / f"1 {kind}"), tmp_path / f"2 {kind}", dialect="chat"
        )
        back = convert.export(convert.import_(chat, tmp_path / f"3 {kind}"), tmp_path / f"4 {kind}")
        assert same_tensors(back, native) and architecture_from_hf(back) == KINDS[kind]


def test_a_written_folder_is_complete(tmp_path: Path) -> None:
    out = convert.export(
        convert.import_(chat_folder(tmp_path), tmp_path / "checkpoint"),
        tmp_path / "out",
        dialect="chat",
    )
    settings = json.loads((out / "config.json").read_text())
    ours = settings
    theirs = chat_settings(SMALL)
    assert theirs.keys() - ours.keys() == {"_commit_hash"}
    for section in ("vision_config", "llm_config"):
        assert theirs[section].keys() - ours[section].keys() <= {"rope_scaling"}
    assert (settings["template"], settings["max_dynamic_patch"], settings["force_image_size"]) == (
        "internvl2_5",
        12,
        28,
    )
    assert (
        settings["auto_map"]["AutoModel"]
        == "OpenGVLab/InternVL2_5-1B--modeling_internvl_chat.InternVLChatModel"
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(TOKENIZER))
    assert "<|im_start|>user\nHow many?<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], tokenize=False
    )
    generation = json.loads((out / "generation_config.json").read_text())
    assert (
        generation["eos_token_id"]
        == tokenizer.convert_tokens_to_ids("<|im_end|>")
        == settings["llm_config"]["eos_token_id"]
    )
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406] and processor["crop_size"] == 28
    assert not list(out.glob("*.py"))


def test_what_a_folder_says_about_its_use_outlives_an_import(tmp_path: Path) -> None:
    chat = chat_folder(tmp_path)
    said = {
        "template": "Hermes-2",
        "system_message": "You describe images.",
        "min_dynamic_patch": 2,
        "max_dynamic_patch": 6,
        "use_thumbnail": False,
    }
    (chat / "config.json").write_text(json.dumps(chat_settings(SMALL) | said))
    words = json.loads((chat / "tokenizer_config.json").read_text()) | {
        "chat_template": "{{ messages[0]['content'] }}"
    }
    (chat / "tokenizer_config.json").write_text(json.dumps(words))
    checkpoint = convert.import_(chat, tmp_path / "checkpoint")
    out = convert.export(checkpoint, tmp_path / "out", dialect="chat")
    assert json.loads((out / "config.json").read_text()).items() >= said.items()
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
        == "{{ messages[0]['content'] }}"
    )
    # transformers' processor must find a place for images in the template.
    native = convert.export(checkpoint, tmp_path / "again")
    assert "<IMG_CONTEXT>" in (native / "chat_template.jinja").read_text()
    assert "You describe images." in (native / "chat_template.jinja").read_text()
    processor = json.loads((native / "preprocessor_config.json").read_text())
    assert (processor["min_patches"], processor["max_patches"]) == (2, 6)


def test_python_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    chat = chat_folder(tmp_path)
    for name in ("configuration_internvl_chat", "modeling_internvl_chat", "tokenization_internlm2"):
        (chat / f"{name}.py").write_text("raise SystemExit('run')\n")
    (chat / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    code = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | code))
    with pytest.raises(
        ValueError,
        match=(
            r"never run; name a folder with the same tokenizer as tokenizer.json with --tokenizer"
        ),
    ):
        convert.import_(chat, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no readable tokenizer"):
        load_tokenizer(chat)
    assert convert.import_(chat, tmp_path / "out", tokenizer=TOKENIZER).is_dir()


def test_a_folder_of_internlm2_is_imported_as_published(tmp_path: Path) -> None:
    chat = chat_folder(tmp_path, "internlm2")
    (chat / "tokenizer.json").unlink()
    published = published_internlm2(chat)
    checkpoint = convert.import_(chat, tmp_path / "start")
    assert fingerprint(load_tokenizer(checkpoint / "tokenizer")) == fingerprint(published)
    out = convert.export(checkpoint, tmp_path / "out", dialect="chat")
    assert same_tensors(out, chat) and (out / "tokenizer.model").is_file()
    text = "<|im_start|>user\nthe  fox<|im_end|>"
    assert load_tokenizer(out)(text)["input_ids"] == published(text)["input_ids"]


def test_a_written_config_is_one_that_the_class_loads(tmp_path: Path) -> None:
    out = convert.export(
        convert.import_(chat_folder(tmp_path, "qwen2 tied"), tmp_path / "start"),
        tmp_path / "out",
        dialect="chat",
    )
    settings = json.loads((out / "config.json").read_text())
    language = settings["llm_config"]
    assert isinstance(language["bos_token_id"], int)  # generate of transformers 4.37 needs one
    assert "attn_implementation" not in language  # else flash-attn must be installed
    # The class unties every model, so a tied head is written twice.
    assert not settings["tie_word_embeddings"] and not language["tie_word_embeddings"]
    weights = load_all(out)
    assert torch.equal(
        weights["language_model.lm_head.weight"],
        weights["language_model.model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("template", ["vicuna", "plain"])
def test_templates_that_the_class_does_not_know_are_refused(tmp_path: Path, template: str) -> None:
    checkpoint = convert.import_(chat_folder(tmp_path), tmp_path / "start")
    usage = json.loads((checkpoint / "usage.json").read_text()) | {"template": template}
    (checkpoint / "usage.json").write_text(json.dumps(usage))
    words = load_tokenizer(checkpoint / "tokenizer")
    words.add_tokens(list(FORMATS[template].markers), special_tokens=True)
    words.save_pretrained(checkpoint / "tokenizer")
    with pytest.raises(ValueError, match=f"no template '{template}', only internvl2_5, Hermes-2"):
        convert.export(checkpoint, tmp_path / "out", dialect="chat")
    assert not (tmp_path / "out").exists()
    assert convert.export(checkpoint, tmp_path / "exported").is_dir()


def test_a_template_that_the_class_of_one_family_knows_is_written_for_it() -> None:
    usage = Usage(template="internvl3_5_gpt_oss", system_message="Be brief.")
    settings = (TextIds(begin=1, end=2, pad=3), torch.float32, usage)
    written = chat_config.write(KINDS["gpt_oss"], *settings)
    assert (written["template"], written["system_message"]) == (usage.template, "Be brief.")
    with pytest.raises(ValueError, match="no template 'internvl3_5_gpt_oss'"):
        chat_config.write(KINDS["qwen2"], *settings)


def test_a_template_of_another_model_passes_through_and_is_not_replaced(tmp_path: Path) -> None:
    chat = chat_folder(tmp_path)
    settings = chat_settings(SMALL) | {"template": "internvl_zh"}
    (chat / "config.json").write_text(json.dumps(settings))
    checkpoint = convert.import_(chat, tmp_path / "start")
    out = convert.export(checkpoint, tmp_path / "out", dialect="chat")
    assert json.loads((out / "config.json").read_text())["template"] == "internvl_zh"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="template 'internvl_zh' is not one of"):
        convert.export(checkpoint, tmp_path / "exported")


def test_a_check_goes_by_parts(tmp_path: Path) -> None:
    parts = convert.check(chat_folder(tmp_path, "internlm2"))
    assert [part.part for part in parts] == ["vision_model", "mlp1", "language_model"]
    assert not any(part.changed for part in parts)
    assert sum(part.tensors for part in parts) == len(load_all(tmp_path / "chat"))


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    chat = chat_folder(tmp_path, "InternViT-6B")
    weights = load_all(chat)
    lost = "vision_model.encoder.layers.1.attn.k_norm.weight"
    odd = "vision_model.encoder.layers.0.attn.qkv.weight"
    save_file(
        {name: tensor for name, tensor in weights.items() if name != lost}
        | {odd: torch.ones(3, 24)},
        chat / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"2 tensors do not fit(.|\n)*") as error:
        convert.import_(chat, tmp_path / "out")
    assert f"{lost}: missing" in str(
        error.value
    ) and f"{odd}: has shape [3, 24], must be [72, 24]" in str(error.value)
    save_file(
        weights | {"vision_model.encoder.layers.0.attn.extra": torch.ones(1)},
        chat / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"attn.extra: not a weight of this model"):
        convert.import_(chat, tmp_path / "out")
    (chat / "model.safetensors").write_bytes((chat / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        convert.import_(chat, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "native"]


def test_transformers_is_not_asked_to_run_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="chat: in the format of InternVLChatModel.*--dialect, such as native"
    ):
        load_reference(chat_folder(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1', must be 'v2'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be trained"),
        ({"select_layer": -4}, "select_layer is -4, must be -1"),
        ({"use_llm_lora": 16}, "use_llm_lora is 16, must be 0"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        (
            {"force_image_size": 56},
            "force_image_size is 56, and vision_config.image_size is 28; resize",
        ),
        (
            {"llm_config": {"model_type": "gpt2"}},
            "llm_config.model_type is 'gpt2', must be one of qwen2",
        ),
        (
            {"llm_config": {"model_type": "internlm2", "bias": True}},
            r"llm_config.num_hidden_layers is missing(.|\n)*llm_config.bias is True",
        ),
        (
            {"vision_config": {"norm_type": "batch_norm"}},
            r"vision_config.image_size is missing(.|\n)*norm_type is 'batch_norm'",
        ),
    ],
)
def test_models_of_other_kinds_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(chat_settings(SMALL) | changes))
    with pytest.raises(ValueError, match=message) as error:
        architecture_from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
