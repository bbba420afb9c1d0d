"""Models that start from a vision folder and a language folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.config.connectors import LLAVA
from megavlm.config.schema import Architecture, Config, Init, Language, Training
from megavlm.convert.hf import convert, from_parts, language_config
from megavlm.convert.hf.lazy_tensors import FullTensor
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.token_ids import TextIds
from megavlm.convert.weights.families import FAMILIES, family_of
from megavlm.convert.weights.tables import EMBEDDING_KEY, HEAD_KEY, rows
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import SPECIAL_TOKENS
from megavlm.planner.flops import pieces
from tests.convert.chat import chat_settings
from tests.convert.models import BARE_GEMMA2, KINDS, SMALL, language, load_all
from tests.convert.part_folders import WORDS, make_language, make_parts, make_tokenizer, make_vision

WHOLE = (slice(None),)
NINE = len(SPECIAL_TOKENS)


def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, 7.0)


def served(init: Init, architecture: Architecture) -> FullTensor:
    config = Config(
        stage="1", model="parts", architecture=architecture, init=init, training=Training(seed=4)
    )
    return from_parts.full_tensors(config, drawn)


@pytest.mark.parametrize("part", ["", "vision", "connector", "language"])
def test_a_folder_that_is_not_of_hugging_face_is_refused_with_its_flag(
    tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "a"
    model = "" if part else str(folder)
    init = Init(**{part: str(folder)}) if part else Init()
    named = f"--init.{part} {folder}: " if part else f"--model {folder}: "
    with pytest.raises(FileNotFoundError, match=f"^{named}no such folder$"):
        from_parts.read_model(model, init)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=rf"^{named}.*config\.json: no such file"):
        from_parts.read_model(model, init)
    (folder / "step_00000003").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{named}holds a checkpoint.* --load {folder} "):
        from_parts.read_model(model, init)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_model_are_that_model(tmp_path: Path, kind: str) -> None:
    architecture = KINDS[kind]
    whole, vision, words = make_parts(tmp_path, architecture)
    expected = convert.full_tensors(whole, architecture)
    found = served(Init(vision=str(vision), language=str(words)), architecture)
    for row in rows(architecture):
        if row.key in (EMBEDDING_KEY, HEAD_KEY):
            kept = slice(0, WORDS)
            assert torch.equal(
                found(row.key, row.shape)[(kept,)], expected(row.key, row.shape)[(kept,)]
            )
        elif row.key.startswith("connector."):
            assert torch.equal(found(row.key, row.shape), drawn(row.key, row.shape))
        else:
            assert torch.equal(
                found(row.key, row.shape)[WHOLE], expected(row.key, row.shape)[WHOLE]
            ), row.key


def test_what_a_file_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    init = Init(language=str(tmp_path))
    settings = language_config.write(
        language(**BARE_GEMMA2).language, FAMILIES["gemma2"], TextIds(begin=0, end=1, pad=2)
    )
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "head_dim"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = from_parts.language_from_hf(init)
    assert (found.attention_softcap, found.final_softcap, found.head_size) == (50.0, 30.0, 256)
    settings = language_config.write(
        KINDS["mistral"].language, FAMILIES["mistral"], TextIds(begin=0, end=1, pad=2)
    )
    del settings["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="sliding_window is 4096, must be None"):
        from_parts.language_from_hf(init)
    # What transformers cannot read is named all the same.
    strange = settings | {"rope_parameters": {"type": "su"}, "sliding_window": 262144}
    (tmp_path / "config.json").write_text(json.dumps(strange))
    with pytest.raises(ValueError, match=r"(?s)window is 262144, .*positions are of type 'su'"):
        from_parts.language_from_hf(init)
    chat = chat_settings(SMALL)
    (tmp_path / "config.json").write_text(json.dumps(chat | {"llm_config": settings}))
    with pytest.raises(ValueError, match="llm_config.sliding_window is 4096, must be None"):
        architecture_from_hf(tmp_path)


def test_two_folders_make_a_model_without_a_name(tmp_path: Path) -> None:
    _, vision, words = make_parts(tmp_path, SMALL)
    found = from_parts.read_model("", Init(vision=str(vision), language=str(words)))
    assert found == replace(SMALL, language=replace(SMALL.language, vocab_size=WORDS + NINE))
    clip = make_vision(tmp_path / "clip", "clip")
    found = from_parts.read_model("", Init(vision=str(clip), language=str(words)))
    assert (
        found.connector.pixel_shuffle,
        found.connector.norm,
        found.features_per_tile,
        found.vision.num_layers,
    ) == (1, False, 16, 2)
    assert found.vision.pixel_mean == (0.48, 0.46, 0.41) and found.vision.activation == "quick_gelu"


@pytest.mark.parametrize("table", [300, 261], ids=["a table that is cut", "a table that grows"])
def test_rows_of_new_tokens_start_as_in_internvl(tmp_path: Path, table: int) -> None:
    folder = make_language(tmp_path / "llm", rows=table)
    wanted = replace(SMALL, language=from_parts.language_from_hf(Init(language=str(folder))))
    assert wanted.language.vocab_size == WORDS + NINE
    tensor = served(Init(language=str(folder)), wanted)
    weights = load_file(folder / "model.safetensors")
    head = tensor(HEAD_KEY, (384, 48))[WHOLE]
    before = weights["lm_head.weight"]
    assert torch.equal(head[:WORDS], before[:WORDS])
    torch.testing.assert_close(head[WORDS:], before[:WORDS].mean(0).expand(NINE, -1))
    embedding = tensor(EMBEDDING_KEY, (384, 48))[WHOLE]
    before = weights["model.embed_tokens.weight"]
    kept = min(table, WORDS + NINE)
    assert embedding.shape == head.shape == (WORDS + NINE, 48) and torch.equal(
        embedding[:kept], before[:kept]
    )
    fresh = embedding[kept:]
    assert not len(fresh) or 0.35 < fresh.std() < 0.65  # initializer_range of the folder is 0.5


def test_shares_of_a_vocabulary_are_shares_of_the_whole(tmp_path: Path) -> None:
    folder = make_language(tmp_path / "llm", rows=261)
    tensor = served(
        Init(language=str(folder)),
        replace(SMALL, language=from_parts.language_from_hf(Init(language=str(folder)))),
    )
    for key in (EMBEDDING_KEY, HEAD_KEY):
        whole = tensor(key, (384, 48))[WHOLE]
        shares = [
            tensor(key, (384, 48))[(slice(start, start + 96), slice(None))]
            for start in range(0, 384, 96)
        ]
        assert torch.equal(torch.cat(shares), whole) and [len(share) for share in shares] == [
            96,
            96,
            WORDS + NINE - 192,
            0,
        ]
        assert torch.equal(
            tensor(key, (384, 48))[(slice(250, 266), slice(5, 20))], whole[250:266, 5:20]
        )


def test_a_tied_head_takes_the_mean_for_both_and_gives_an_untied_model_its_copy(
    tmp_path: Path,
) -> None:
    folder = make_language(tmp_path / "llm", tied=True)
    tied = replace(SMALL, language=from_parts.language_from_hf(Init(language=str(folder))))
    assert tied.language.tied_head and "lm_head.weight" not in load_all(folder)
    words = load_all(folder)["model.embed_tokens.weight"]
    mean = words[:WORDS].mean(0).expand(NINE, -1)
    torch.testing.assert_close(
        served(Init(language=str(folder)), tied)(EMBEDDING_KEY, (384, 48))[WHOLE][WORDS:], mean
    )
    untied = served(
        Init(language=str(folder)), replace(tied, language=replace(tied.language, tied_head=False))
    )
    assert torch.equal(untied(EMBEDDING_KEY, (384, 48))[WHOLE], words[: WORDS + NINE])
    assert torch.equal(untied(HEAD_KEY, (384, 48))[WHOLE][:WORDS], words[:WORDS])


def test_an_untied_head_of_a_tied_language_model_is_told(tmp_path: Path) -> None:
    init = Init(language=str(make_language(tmp_path / "llm", tied=True)))
    tied = replace(SMALL, language=from_parts.language_from_hf(init))
    untied = replace(tied, language=replace(tied.language, tied_head=False))
    assert from_parts.notes(init, tied) == []
    [note] = from_parts.notes(init, untied)
    assert "--architecture.language.tied_head true keeps it tied" in note
    plain = Init(language=str(make_language(tmp_path / "plain")))
    assert from_parts.notes(plain, untied) == from_parts.notes(Init(), untied) == []


def test_a_language_model_alone_says_what_the_language_part_is(tmp_path: Path) -> None:
    _, vision, words = make_parts(tmp_path, SMALL)
    init = Init(language=str(words))
    language = from_parts.language_from_hf(init)
    assert from_parts.read_model("", init) == Architecture(language=language)
    both = from_parts.read_model("", replace(init, vision=str(vision)))
    assert from_parts.read_model(str(vision), init) == both
    known = Architecture(vision=SMALL.vision, connector=LLAVA, language=Language(num_layers=2))
    assert from_parts.read_model("", init, known) == replace(known, language=language)
    assert from_parts.read_model("", Init(vision=str(vision)), known) == replace(
        known, vision=both.vision
    )


def test_a_tokenizer_that_has_the_tokens_changes_no_row(tmp_path: Path) -> None:
    folder = make_language(tmp_path / "llm", rows=WORDS + NINE)
    make_tokenizer(folder, SPECIAL_TOKENS)
    tensor = served(
        Init(language=str(folder)),
        replace(SMALL, language=from_parts.language_from_hf(Init(language=str(folder)))),
    )
    assert torch.equal(tensor(HEAD_KEY, (384, 48))[WHOLE], load_all(folder)["lm_head.weight"])


@pytest.mark.parametrize("part", [False, True], ids=["a whole model", "a part"])
def test_positions_are_resized_to_other_tiles_as_in_internvl(tmp_path: Path, part: bool) -> None:
    whole, vision, _ = make_parts(tmp_path, SMALL)
    larger = replace(SMALL, vision=replace(SMALL.vision, image_size=56))
    tensor = (
        served(Init(vision=str(vision)), larger) if part else convert.full_tensors(whole, larger)
    )
    found = tensor("vision.position_embedding", (1, 65, 24))[WHOLE]
    before = load_all(whole)["vision_model.embeddings.position_embedding"]
    expected = torch.nn.functional.interpolate(
        before[:, 1:].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2),
        size=8,
        mode="bicubic",
        align_corners=False,
    )
    assert torch.equal(found[:, :1], before[:, :1])
    assert torch.equal(found[:, 1:], expected.reshape(1, 24, 64).transpose(1, 2).to(before.dtype))


def test_the_tokenizer_of_a_part_can_be_packed_with(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer, new = from_parts.extend_tokenizer(Init(language=str(tmp_path)))
    assert new == tuple(range(WORDS, WORDS + NINE)) and tokenizer.convert_ids_to_tokens(
        list(new)
    ) == list(SPECIAL_TOKENS)
    assert ChatTemplate(tokenizer, 4).context_token_id == WORDS + 2


def test_a_tokenizer_that_is_python_code_is_named_elsewhere(tmp_path: Path) -> None:
    folder = make_language(tmp_path / "llm")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        ValueError,
        match=(
            r"--init.language .*llm: holds no tokenizer .*; name the folder of one with"
            r" --init.tokenizer"
        ),
    ):
        from_parts.language_from_hf(Init(language=str(folder)))
    make_tokenizer(tmp_path / "words")
    init = Init(language=str(folder), tokenizer=str(tmp_path / "words"))
    assert from_parts.language_from_hf(init).vocab_size == WORDS + NINE


def test_what_does_not_fit_is_refused_with_its_flag(tmp_path: Path) -> None:
    _, vision, words = make_parts(tmp_path, SMALL)
    init = Init(vision=str(vision), language=str(words))
    with pytest.raises(
        ValueError,
        match=(
            r"--init.vision .*vision: .*\n  --architecture.vision.num_layers: 2 there, 5 asked for"
        ),
    ):
        from_parts.refuse_other(init, replace(SMALL, vision=replace(SMALL.vision, num_layers=5)))
    with pytest.raises(
        ValueError,
        match=(
            r"--init.language .*language: .*\n  --architecture.language.rotary_base: 12345.0 there"
        ),
    ):
        from_parts.refuse_other(init, language(rotary_base=1e6))
    with pytest.raises(
        ValueError,
        match=r"--architecture.language.vocab_size 262: .* has ids up to 267, .*; use 268",
    ):
        from_parts.refuse_other(init, language(vocab_size=262))
    with pytest.raises(
        ValueError,
        match=(
            r"--init.language .*vision/config.json: model_type is 'intern_vit_6b', must be one of"
            r" qwen2"
        ),
    ):
        from_parts.language_from_hf(Init(language=str(make_tokenized(vision))))
    with pytest.raises(
        ValueError,
        match=(
            r"--init.vision .*language/config.json: model_type is 'qwen2', must be one of"
            r" intern_vit_6b, clip"
        ),
    ):
        from_parts.vision_from_hf(words)
    weights = load_all(vision)
    del weights["encoder.layers.1.attn.proj.bias"]
    save_file(weights, vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=(
            r"vision: 1 tensors do not fit the model:\n  encoder.layers.1.attn.proj.bias: missing"
        ),
    ):
        served(init, SMALL)


def make_tokenized(folder: Path) -> Path:
    """Add a tokenizer to the folder."""
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "wrong", [{"hidden_act": "relu"}, {"num_hidden_layers": 1}, {"num_channels": 1}]
)
def test_other_clips_are_refused(tmp_path: Path, wrong: dict) -> None:
    folder = make_vision(tmp_path / "clip", "clip")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=f"config.json: .*\n  {next(iter(wrong))} is "):
        from_parts.vision_from_hf(folder)


def test_a_model_that_hugging_face_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    clip = from_parts.vision_from_hf(make_vision(tmp_path / "clip", "clip"))
    with pytest.raises(ValueError, match="family internvit; this model has clip"):
        rows(replace(SMALL, vision=clip))


def test_gemma_2b_is_read_as_it_was_published() -> None:
    published = {
        "model_type": "gemma",
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    }
    assert list(language_config.problems(published, "")) == []
    found = language_config.read(published, tied_head=True)
    parts = ("language", "head")
    found = [piece for piece in pieces(Architecture(language=found)) if piece.part in parts]
    assert sum(piece.elements for piece in found) == 2_506_172_416
    for wrong in ({"hidden_act": "silu"}, {"use_bidirectional_attention": True}):
        [problem] = language_config.problems(published | wrong, "text_config")
        assert next(iter(wrong)) in problem


def test_persimmon_8b_is_read_as_it_was_published() -> None:
    published = {
        "model_type": "persimmon",
        "hidden_act": "relu2",
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "num_attention_heads": 64,
        "num_hidden_layers": 36,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
        "rope_scaling": None,
        "rope_theta": 25000.0,
        "vocab_size": 262144,
    }
    assert list(language_config.problems(published, "")) == []
    found = language_config.read(published, tied_head=False)
    family_of(found)
    parts = ("language", "head")
    weights = [piece for piece in pieces(Architecture(language=found)) if piece.part in parts]
    layer = 4 * 4096**2 + 4 * 4096 + 2 * 4096 * 16384 + 4096 + 16384 + 4 * 4096 + 4 * 64
    expected = 36 * layer + 2 * 262144 * 4096 + 2 * 4096
    assert sum(piece.elements for piece in weights) == expected
    assert found.rotary_base == 25000 and found.num_query_groups == 64
    [problem] = language_config.problems(published | {"partial_rotary_factor": 0.25}, "text_config")
    assert "text_config.partial_rotary_factor is 0.25, must be 0.5" in problem
    with pytest.raises(ValueError, match="num_query_groups is 8, must be 64"):
        family_of(replace(found, num_query_groups=8))
