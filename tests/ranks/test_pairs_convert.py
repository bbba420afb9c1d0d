"""CLIP and SigLIP of transformers, imported, give the same similarities, and are exported bit for
bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPModel, SiglipModel

from megavlm.config.schema import Architecture, Config, Data
from megavlm.convert.hf import convert
from megavlm.convert.hf.json_files import write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.safetensors_files import SafetensorsFolder
from megavlm.data.loading.batch import BatchOptions
from tests.convert.card import run_example
from tests.convert.pair_models import make_pair_model
from tests.data.pair_tokenizer import make_pair_tokenizer
from tests.data.samples import make_sample, write_packs
from tests.ranks.pool import Pool
from tests.ranks.runs import build, config_for

END = 3


def make_model(kind: str) -> CLIPModel | SiglipModel:
    return make_pair_model(kind, vocab_size=199, positions=16, begin=1, end=END, noise=0.05)


def make_pairs(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Write one pack of four pairs; return tokens, filled up, and tiles."""
    from megavlm.data.loading.dataset import PackedDataset

    rng = np.random.default_rng(2)
    samples = []
    for line, words in enumerate((7, 12, 4, 16)):
        count = 16 if kind == "siglip" else words
        sample = make_sample(
            rng,
            images=1,
            text_tokens=count,
            line=line + 1,
            vocab_size=199,
            context_token_id=0,
            tile_size=16,
            features_per_tile=0,
            grids=((1, 1),),
        )
        tokens = np.where(sample.tokens == END, END + 1, sample.tokens)
        tokens[-1] = END
        samples.append(dataclasses.replace(sample, tokens=tokens))
    facts = dict(vocab_size=199, context_token_id=-1, tile_size=16, features_per_tile=0)
    write_packs(folder, [samples], capacity=80, **facts)
    batch = PackedDataset(folder).batch(0, 0, BatchOptions(reduction="sample"))
    texts = np.full((4, 16), END, np.int64)
    for row, sample in enumerate(samples):
        texts[row, : len(sample.tokens)] = sample.tokens
    return texts, batch.tiles.numpy()


def similarities(config: Config, folder: str) -> Any:
    """Embed a pack with the weights of a Hugging Face folder, on every rank."""
    from megavlm.model import weights

    job = build(config)
    weights.fill(job.chunks, convert.full_tensors(folder, config.architecture))
    [chunk] = job.chunks
    chunk.eval()
    batch = job.train.batch(0, 0, BatchOptions(reduction="sample", vision_layers=2))
    with torch.no_grad():
        images, texts = chunk(batch)
        scale = chunk.objective.logit_scale.exp()
        bias = chunk.objective.logit_bias
        found = scale * texts @ images.T
        return (found if bias is None else found + bias).numpy()


def config_of(architecture: Architecture, packs: Path, **settings: Any) -> Config:
    config = config_for(packs, **settings)
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    return dataclasses.replace(config, architecture=architecture, data=data)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_similarities_are_those_of_transformers(ranks: Pool, tmp_path: Path, kind: str) -> None:
    model = make_model(kind)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    texts, tiles = make_pairs(tmp_path / "packs", kind)
    architecture = architecture_from_hf(folder)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(texts),
            pixel_values=(torch.from_numpy(tiles) / 255 - mean) / std,
        ).logits_per_text.numpy()
    for world, layout in ((1, {}), (2, {"tensor_model_parallel_size": 2})):
        config = config_of(architecture, tmp_path / "packs", **layout)
        for found in ranks.run(similarities, world, config, str(folder)):
            assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert [check.changed for check in convert.check(folder)] == [()] * len(convert.check(folder))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_import_is_exported_bit_for_bit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "hf")
    if kind == "siglip":  # the way of SigLIP 2
        write_json(tmp_path / "hf" / "preprocessor_config.json", {"resample": 2})
    make_pair_tokenizer(tmp_path / "words", ("a", "b"))
    checkpoint = convert.import_(tmp_path / "hf", tmp_path / "start", tokenizer=tmp_path / "words")
    out = convert.export(checkpoint, tmp_path / "out")
    before = SafetensorsFolder(tmp_path / "hf")
    after = SafetensorsFolder(out)
    assert set(before.headers) == set(after.headers)
    for name in before.headers:
        assert torch.equal(before[name], after[name]), name
    assert architecture_from_hf(out) == architecture_from_hf(tmp_path / "hf")
    assert AutoImageProcessor.from_pretrained(out).resample == (2 if kind == "siglip" else 3)
    again = type(model).from_pretrained(out)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert run_example(out, monkeypatch, capsys).startswith("tensor([[")
    if kind == "clip":  # transformers would take another token for the end of a text
        old = make_pair_tokenizer(tmp_path / "old", ())
        with pytest.raises(ValueError, match="its eos_token has the id 2"):
            convert.export(checkpoint, tmp_path / "none", tokenizer=old)
    with pytest.raises(
        ValueError, match="objective next_token or preference; this model has contrastive"
    ):
        convert.export(checkpoint, tmp_path / "native", dialect="native")
