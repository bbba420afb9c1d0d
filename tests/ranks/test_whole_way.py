"""From image files and JSONL through packs and training to a model that ``transformers`` loads, and
back.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.config.averages import Ema
from megavlm.config.lora import Lora
from megavlm.config.preference import Preference
from megavlm.config.schema import Checkpoint, Config, Logging
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_sources
from megavlm.data.text.tokenizer import load_tokenizer
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for
from tests.ranks.test_resume import run_job

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"
COLOURS = {"red": (250, 20, 20), "blue": (20, 20, 250), "table": (90, 60, 30)}


def write_records(folder: Path) -> Path:
    """Plain images of several shapes and questions about their colour, with text-only and two-image
    records between them.
    """
    rng = np.random.default_rng(0)
    lines = []
    for number in range(36):
        name = list(COLOURS)[number % 3]
        width, height = rng.choice([16, 32, 48], 2)
        Image.new("RGB", (int(width), int(height)), COLOURS[name]).save(folder / f"{number}.png")
        question, images = (
            ("<image>\nWhat is it?", [f"{number}.png"]) if number % 4 else ("Say it.", [])
        )
        if number % 6 == 5:
            question = "<image>\n<image>\nWhat is the first?"
            images = [f"{number}.png", f"{number - 1}.png"]
        record = {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"It is {name}."},
            ]
        }
        lines.append(
            json.dumps(
                record | ({"image": images if len(images) > 1 else images[0]} if images else {})
            )
        )
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "records.jsonl"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    sources = read_sources(None, str(write_records(folder)), str(folder))
    tiling = Tiling(tile_size=16, min_tiles=1, max_tiles=4, thumbnail=True)
    out = folder / "packs"
    pack_dataset(
        Job(
            sources=sources,
            tokenizer=str(TOKENIZER),
            out=str(out),
            capacity=512,
            features_per_tile=4,
            tiling=tiling,
        )
    )
    return out


def _pack_preferences(folder: Path, out: Path) -> Path:
    """Pack the records as preferences: another colour is rejected."""
    lines = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        asked, answer = (turn["value"] for turn in record.pop("conversations"))
        record |= {"question": asked, "chosen": answer, "rejected": "It is a green chair."}
        lines.append(json.dumps(record))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    settings = dict(tokenizer=str(TOKENIZER), out=str(out), capacity=512, features_per_tile=4)
    sources = read_sources(None, str(folder / "pairs.jsonl"), str(folder))
    tiling = Tiling(tile_size=16, min_tiles=1, max_tiles=4, thumbnail=True)
    pack_dataset(Job(sources=sources, tiling=tiling, preferences=True, **settings))
    return out


def whole_config(packs: Path, save: Path, **checkpoint) -> Config:
    architecture = dataclasses.replace(
        TINY,
        language=dataclasses.replace(
            TINY.language, vocab_size=457 + 4, max_position_embeddings=1024
        ),
    )
    config = config_for(packs, steps=3, global_batch_size=2)
    config = dataclasses.replace(
        config, architecture=architecture, data=dataclasses.replace(config.data, valid=str(packs))
    )
    return dataclasses.replace(
        config, checkpoint=Checkpoint(save=str(save), **checkpoint), logging=Logging(interval=1)
    )


def _with_adapters(packs: Path, save: Path, hf: Path) -> Config:
    """Configure a run that trains adapters in bfloat16 and exports their averages."""
    config = whole_config(packs, save, export_hf=str(hf))
    lora = Lora(rank=4, targets=("vision", "language"), dora=True)
    training = dataclasses.replace(
        config.training, precision="bfloat16", trainable=("connector", "*.lora")
    )
    architecture = dataclasses.replace(config.architecture, lora=lora)
    ema = Ema(decay=0.5, export=True)
    return dataclasses.replace(config, training=training, architecture=architecture, ema=ema)


def agreement(
    load: Path, hf: Path, packs: Path, dtype: str = "float32", ema: bool = False, count: int = 2
):
    """Return how near the trained and the exported model are."""
    from tools.verification.logits import compare

    return compare(str(load), hf, packs, count, dtype, averages=ema)


def _valid_losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


@pytest.fixture(scope="module")
def trained(ranks: Pool, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two ranks and its export."""
    folder = tmp_path_factory.mktemp("trained")
    ranks.run(run_job, 2, whole_config(packs, folder / "run", export_hf=str(folder / "hf")))
    return folder


def test_the_exported_model_is_the_trained_one_and_can_be_trained_on(
    ranks: Pool, packs: Path, trained: Path, tmp_path: Path
) -> None:
    [found] = ranks.run(agreement, 1, trained / "run", trained / "hf", packs)
    assert found.samples >= 4 and found.max_abs_difference <= 1e-4
    assert found.equal_choices == found.tokens and not found.failures()
    [rounded] = ranks.run(agreement, 1, trained / "run", trained / "hf", packs, "bfloat16")
    assert rounded.max_abs_difference > 0 and not rounded.failures()
    # A run that starts from the exported folder begins where the first one ended.
    ranks.run(run_job, 1, whole_config(packs, tmp_path / "again", load=str(trained / "hf")))
    assert _valid_losses(tmp_path / "again")[0] == pytest.approx(
        _valid_losses(trained / "run")[-1], rel=1e-5
    )
    assert _valid_losses(tmp_path / "again")[1] < _valid_losses(tmp_path / "again")[0]


def test_a_model_is_trained_on_preferences_from_an_export_and_compared_on_them(
    ranks: Pool, packs: Path, trained: Path, tmp_path: Path
) -> None:
    pairs = _pack_preferences(packs.parent, tmp_path / "pairs")
    folders = dict(load=str(trained / "hf"), export_hf=str(tmp_path / "mpo"))
    config = whole_config(pairs, tmp_path / "preferred", **folders)
    model = dataclasses.replace(
        config.architecture, objective="preference", preference=Preference(beta=0.5)
    )
    data = dataclasses.replace(config.data, loss_reduction="sample")
    ranks.run(run_job, 2, dataclasses.replace(config, architecture=model, data=data))
    # Both answers of a pair show its images, of which the packs say that they are the first one's.
    compared = (tmp_path / "preferred", tmp_path / "mpo", pairs, "float32", False, 99)
    [found] = ranks.run(agreement, 1, *compared)
    assert found.samples == 2 * 36 and found.max_abs_difference <= 1e-4 and not found.failures()


def test_an_export_that_differs_is_noticed(ranks: Pool, packs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ranks.run(run_job, 1, _with_adapters(packs, tmp_path / "run", tmp_path / "hf"))
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    name = next(
        name
        for name in weights
        if name.startswith("language_model.") and name.endswith("norm.weight")
    )

    def compared(changes: dict):
        save_file(weights | changes, file, metadata={"format": "pt"})
        options = ("float32", True)
        return ranks.run(agreement, 1, tmp_path / "run", tmp_path / "hf", packs, *options)[0]

    found = compared({name: weights[name] * 2})
    assert found.max_abs_difference > 1e-4 and "logits differ" in found.failures()[0]
    found = compared({name: weights[name] * float("nan")})
    assert found.not_finite == found.tokens > 0
    assert "NaN or infinite" in found.failures()[0]
    # Adapters are merged and the weights rounded, as in the export, before they are compared.
    found = compared({})
    assert weights[name].dtype == torch.bfloat16 and not found.failures()

    tokenizer = load_tokenizer(tmp_path / "hf")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(AssertionError, match="--data: packs of another tokenizer"):
        compared({})
