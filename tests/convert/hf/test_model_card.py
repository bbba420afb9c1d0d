"""Test the model card of an exported folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megavlm.checkpoint import train_state
from megavlm.checkpoint.step_folder import CONFIG_NAME, TOKENIZER
from megavlm.config.cli import from_yaml, to_yaml
from megavlm.config.parts import Init
from megavlm.convert.hf import convert
from megavlm.convert.hf.command_line import read_size
from megavlm.convert.hf.model_card import read_licenses
from megavlm.data.store.manifest import Manifest, Source, Totals
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert.card import counted_parts
from tests.convert.models import load_all, make_hf
from tests.convert.tool import run_tool


def trained(folder: Path) -> Path:
    """Write a checkpoint as training leaves it."""
    step = convert.import_(make_hf(folder / "hf"), folder / "step")
    config = from_yaml(step / CONFIG_NAME)
    training = dataclasses.replace(
        config.training, trainable=("connector", "language"), global_batch_size=7
    )
    init = Init(vision="/home/somebody/InternViT-300M", language="/home/somebody/Qwen2.5-0.5B")
    config = dataclasses.replace(config, training=training, init=init, stage="1.5")
    (step / CONFIG_NAME).write_text(to_yaml(config))
    found = train_state.read(step)
    state = dataclasses.replace(found, step=1234, consumed=8638, stage="1.5", valid_loss=1.23456)
    train_state.write(state, step)
    annotations = "/home/somebody/captions.jsonl"
    source = Source(name="captions", annotations=annotations, records=12345, samples=12340)
    Manifest(
        tokenizer_fingerprint=found.tokenizer,
        vocab_size=len(load_tokenizer(step / TOKENIZER)),
        context_token_id=5,
        template="Hermes-2",
        system_message="Be brief.",
        image_size=28,
        features_per_tile=4,
        max_tiles=3,
        capacity=512,
        tile_cap=8,
        sources=(source,),
        rejects={"no_answer": 5},
        totals=Totals(
            packs=99, samples=12340, tokens=50000, supervised=4000, images=12340, tiles=20000
        ),
    ).write(step)
    return step


def test_a_card_states_what_the_checkpoint_knows(tmp_path: Path) -> None:
    out = convert.export(
        trained(tmp_path), tmp_path / "out", licenses={"model": "mit", "language": "apache-2.0"}
    )
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["license"] == "mit" and settings["pipeline_tag"] == "image-text-to-text"
    for told in (
        "stage: `1.5`",
        "steps: 1,234, of 7 packs",
        "packs: 8,638",
        "trainable: `connector`, `language`",
        "validation packs after the last step: 1.2346",
        "| captions | 12,345 | 12,340 | 1 |",
        "Rejected records: no_answer 5.",
        "12,340 samples with 50,000 tokens (4,000 of them supervised)",
        "template: `Hermes-2`",
        "system message: Be brief.",
        "tiles of an image: 1 to 3, and a thumbnail",
        "started from `Qwen2.5-0.5B` (`--init.language`)",
        "| language | apache-2.0 |",
        "| vision | not told |",
        "`AutoProcessor` needs torchvision",
    ):
        assert told in text
    assert "somebody" not in text
    counted = counted_parts(out)
    assert list(counted) == ["vision", "connector", "language"]
    tensors = load_all(out)
    assert sum(counted.values()) == sum(tensor.numel() for tensor in tensors.values())
    connector = [tensor for name, tensor in tensors.items() if "projector" in name]
    assert counted["connector"] == sum(tensor.numel() for tensor in connector)


def test_a_card_says_that_a_blend_has_more_data(tmp_path: Path) -> None:
    step = trained(tmp_path)
    settings = (step / CONFIG_NAME).read_text()
    (step / CONFIG_NAME).write_text(settings.replace("train: ''", "train: /home/somebody/a,b"))
    text = (convert.export(step, tmp_path / "out") / "README.md").read_text()
    assert "Of packs of `a`, `b`.\nWhat follows is told of one of them" in text
    assert "somebody" not in text


def test_a_card_invents_nothing(tmp_path: Path) -> None:
    start = convert.import_(make_hf(tmp_path / "hf"), tmp_path / "start")
    text = (convert.export(start, tmp_path / "out", dialect="chat") / "README.md").read_text()
    assert "it did not train them" in text and "told no licence" in text
    assert "license:" not in text and "## Data" not in text and "learning rate" not in text
    assert "InternVLChatModel" in text and "AutoProcessor" not in text


def test_options_of_the_tool_reach_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = convert.import_(make_hf(tmp_path / "hf"), tmp_path / "start")
    arguments = ["export", "--load", str(start), "--out", str(tmp_path / "out")]
    wrong = ["--license", "weights=mit"]
    assert run_tool(*arguments, *wrong) == 2
    assert "--license weights=mit: must be NAME or PART=NAME" in capsys.readouterr().err
    assert run_tool(*arguments, "--max_shard_size", "5 apples") == 2
    assert "--max_shard_size 5 apples" in capsys.readouterr().err
    right = ["--license", "mit", "--license", "data=cc-by-4.0", "--max_shard_size", "40KB"]
    assert run_tool(*arguments, *right) == 0
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    largest = max(tensor.nbytes for tensor in load_all(tmp_path / "out").values())
    header = 20_000
    assert all(path.stat().st_size < max(40_000, largest) + header for path in files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "mit"' in card and "| data | cc-by-4.0 |" in card
    with pytest.raises(ValueError, match="model has mit already"):
        read_licenses(["mit", "model=apache-2.0"])
    assert read_size("1.5GB") == 1_500_000_000 and read_size("77") == 77
