"""A Q-Former that starts from a folder: of a BLIP-2, or of a BERT."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Init
from megavlm.convert.hf import from_parts
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.weights.qformer import rows
from tests.convert.blip2_models import KINDS, OPT, make_blip2, make_instructblip
from tests.convert.models import load_all
from tests.ranks.runs import config_for

FRESH = torch.tensor([-7.0])


def with_text(architecture: Architecture, **sizes) -> Architecture:
    qformer = dataclasses.replace(architecture.connector.qformer, text=True, **sizes)
    return dataclasses.replace(architecture, connector=Connector(kind="qformer", qformer=qformer))


def started(folder: Path, architecture: Architecture, text: str = "") -> dict[str, torch.Tensor]:
    """Return every weight of the connector of a run that starts from a folder, or two; ``FRESH``
    for a fresh one.
    """
    init = Init(connector=str(folder), text=text)
    config = dataclasses.replace(config_for(Path("packs")), architecture=architecture, init=init)
    tensor = from_parts.full_tensors(config, lambda key, shape: FRESH)
    found = {}
    for row in rows(architecture):
        whole = tensor(f"connector.{row.key}", row.shape)
        is_fresh = whole is FRESH
        found[row.key] = whole if is_fresh else whole[tuple(slice(0, n) for n in row.shape)]
    return found


def make_bert(folder: Path) -> Path:
    """Write a small random BERT."""
    torch.manual_seed(2)
    sizes = dict(
        hidden_size=42,
        num_hidden_layers=3,
        num_attention_heads=7,
        intermediate_size=52,
        vocab_size=60,
        max_position_embeddings=23,
    )
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(folder)
    return folder


def test_all_but_what_another_language_model_needs_comes_from_a_blip2(tmp_path: Path) -> None:
    folder = make_blip2(tmp_path / "hf", KINDS["opt"], torch.float32)
    before = load_all(folder)
    wider = dataclasses.replace(OPT, language=dataclasses.replace(OPT.language, hidden_size=60))
    for architecture, fresh in ((OPT, set()), (wider, {"output.weight", "output.bias"})):
        found = started(folder, architecture)
        assert {key for key, tensor in found.items() if tensor is FRESH} == fresh
        for row in rows(architecture):
            if row.key not in fresh:
                expected = row.join([before[name] for name in row.names])
                assert torch.equal(found[row.key], expected), row.key


def test_a_bert_gives_its_layers_and_its_mlps_twice(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert")
    before = load_all(folder)
    found = started(folder, with_text(OPT))
    fresh = {key for key, tensor in found.items() if tensor is FRESH}
    assert fresh == {
        key
        for key in found
        if key.startswith(("norm.", "queries", "output.")) or ".cross_attention" in key
    }
    layer = "bert.encoder.layer.1."
    query, key, value = (
        before[f"{layer}attention.self.{name}.weight"] for name in ("query", "key", "value")
    )
    assert torch.equal(found["layers.1.attention.qkv.weight"], torch.cat([query, key, value]))
    for mlp in ("query_mlp", "text_mlp"):
        first = found[f"layers.1.{mlp}.up.weight"]
        assert torch.equal(first, before[f"{layer}intermediate.dense.weight"])
        last = found[f"layers.1.{mlp}_norm.bias"]
        assert torch.equal(last, before[f"{layer}output.LayerNorm.bias"])
    norm = before["bert.embeddings.LayerNorm.weight"]
    assert torch.equal(found["embedding_norm.weight"], norm)
    # One row more than BERT has: the token that begins a text that is generated.
    words = found["token_embedding.weight"]
    assert len(words) == 61
    assert torch.equal(words[:60], before["bert.embeddings.word_embeddings.weight"])
    assert 0 < words[60].std() < 0.1


@pytest.mark.parametrize("kind", ["bert", "instructblip"])
def test_what_reads_texts_comes_from_another_folder(tmp_path: Path, kind: str) -> None:
    folder = make_blip2(tmp_path / "hf", KINDS["llama"], torch.float32)
    text = tmp_path / "text"
    if kind == "bert":
        make_bert(text)
    else:
        make_instructblip(text, dtype=torch.float32)
    known = with_text(KINDS["llama"], vocab_size=61, max_position_embeddings=8)
    init = Init(connector=str(folder), text=str(text))
    model = from_parts.read_model("", init, known)
    assert model == with_text(KINDS["llama"], vocab_size=61, max_position_embeddings=23)
    found = started(folder, model, str(text))
    assert not any(tensor is FRESH for tensor in found.values())
    alone = started(text, model)
    without = started(folder, KINDS["llama"])
    for key, tensor in found.items():
        reads_texts = key not in without
        assert reads_texts == ("text_mlp" in key or key.startswith(("token_", "position_")))
        expected = alone[key] if reads_texts else without[key]
        if (kind, key) != ("bert", "token_embedding.weight"):  # with a row of its own
            assert torch.equal(tensor, expected), key
    narrow = dataclasses.replace(OPT.connector.qformer, ffn_hidden_size=50)
    other = dataclasses.replace(
        KINDS["llama"], connector=dataclasses.replace(OPT.connector, qformer=narrow)
    )
    init = Init(connector=str(make_blip2(tmp_path / "narrow", other)), text=str(text))
    with pytest.raises(ValueError, match="ffn_hidden_size 52, and that of --init.connector has 50"):
        from_parts.read_model("", init, known)


def test_the_sizes_of_a_folder_are_taken_over(tmp_path: Path) -> None:
    other = dataclasses.replace(OPT.connector.qformer, queries=3, num_layers=2, hidden_size=56)
    changed = dataclasses.replace(OPT, connector=Connector(kind="qformer", qformer=other))
    folder = make_blip2(tmp_path / "hf", changed, torch.float32)
    init = Init(connector=str(folder))
    assert from_parts.read_model("", init, OPT).connector.qformer == other
    bert = Init(connector=str(make_bert(tmp_path / "bert")))
    found = from_parts.read_model("", bert, with_text(OPT, num_layers=8))
    assert found == with_text(OPT)


def test_other_folders_and_models_are_refused(tmp_path: Path) -> None:
    folder = make_blip2(tmp_path / "hf", OPT, torch.float32)
    init = Init(connector=str(folder))
    with pytest.raises(ValueError, match="reads no texts, and the model's does"):
        from_parts.read_model("", init, with_text(OPT))
    with pytest.raises(ValueError, match="--init.text .* its Q-Former reads no texts"):
        from_parts.read_model("", dataclasses.replace(init, text=str(folder)), with_text(OPT))
    with pytest.raises(ValueError, match="--init.text .* the model's Q-Former reads no texts"):
        from_parts.read_model("", dataclasses.replace(init, text=str(folder)), OPT)
    mlp = dataclasses.replace(OPT, connector=Connector())
    with pytest.raises(ValueError, match="the connector is mlp, which starts from no folder"):
        from_parts.read_model("", init, mlp)
    settings = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {"model_type": "llama"})
    with pytest.raises(ValueError, match="'llama', must be one of blip-2, instructblip, bert"):
        from_parts.read_model("", init, OPT)
