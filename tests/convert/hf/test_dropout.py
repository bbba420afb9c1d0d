"""Dropout that folders state: every family is read alike, and whoever starts from one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from megavlm.config.schema import Init
from megavlm.convert.hf import dropout, language_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.families import FAMILIES
from tests.convert.blip2_models import make_blip2
from tests.convert.hf.test_foreign_settings import INTERNVIT, LANGUAGE_MODELS
from tests.convert.idefics_models import FLAMINGO, make_idefics
from tests.convert.models import make_hf
from tests.convert.tool import run_tool

QFORMER = "qformer_config.hidden_dropout_prob 0.1, qformer_config.attention_probs_dropout_prob 0.1"


@pytest.mark.parametrize(
    "config", [*LANGUAGE_MODELS, transformers.Gemma2Config()], ids=lambda config: config.model_type
)
def test_no_family_is_refused_for_its_dropout(config: transformers.PreTrainedConfig) -> None:
    settings = config.to_dict() | FAMILIES[config.model_type].settings
    before = list(language_config.problems(settings, ""))
    settings |= {"attention_dropout": 0.25, "hidden_dropout": 0.5, "resid_pdrop": 0.125}
    assert list(language_config.problems(settings, "")) == before
    assert {"attention_dropout 0.25", "resid_pdrop 0.125"} < set(dropout.stated(settings))


def test_an_import_tells_the_dropout_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, make, listed in (
        ("internvl", make_hf, ""),
        ("blip2", make_blip2, f"{QFORMER}, text_config.dropout 0.1: "),
    ):
        folder = make(tmp_path / name)
        assert run_tool("import", "--hf", str(folder), "--out", str(tmp_path / f"{name}_out")) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
        assert len(notes) == bool(listed)
        assert not listed or f"note: {folder}/config.json: " in notes[0]
        assert not listed or all(part in notes[0] for part in listed.split(", "))


def test_an_idefics_with_dropout_is_read_and_told(tmp_path: Path) -> None:
    folder = make_idefics(tmp_path)
    settings = read_json(folder / "config.json") | {"dropout": 0.5}
    settings["vision_config"]["attention_dropout"] = 0.25
    write_json(folder / "config.json", settings)
    assert architecture_from_hf(folder).cross_attention == FLAMINGO.cross_attention
    [note] = dropout.notes_on_model(folder)
    assert "dropout 0.5" in note and "vision_config.attention_dropout 0.25" in note


def test_of_a_part_its_own_section_is_told(tmp_path: Path) -> None:
    whole = make_blip2(tmp_path / "blip2")
    write_json(tmp_path / "config.json", INTERNVIT | {"drop_path_rate": 0.1})
    bert = tmp_path / "bert"
    transformers.BertConfig().save_pretrained(bert)
    parts = Init(vision=str(whole), language="", connector=str(bert))
    [note] = dropout.notes_on_parts(parts)
    assert note.startswith(f"{bert}/config.json: hidden_dropout_prob 0.1, ")
    assert dropout.notes_on_parts(Init(text=str(bert))) == [note]
    assert dropout.notes_on_parts(Init(connector=str(bert), text=str(bert))) == [note]
    parts = Init(vision=str(tmp_path), connector=str(whole))
    vision, connector = dropout.notes_on_parts(parts)
    assert f"{tmp_path}/config.json: drop_path_rate 0.1: " in vision
    assert f": {QFORMER}: " in connector
    transformers.OPTConfig().save_pretrained(tmp_path / "opt")
    [note] = dropout.notes_on_parts(Init(language=str(tmp_path / "opt")))
    assert note.startswith(f"{tmp_path}/opt/config.json: dropout 0.1: ")
