"""``Blip2ForImageTextRetrieval`` of transformers, imported, gives the same scores, and is exported
bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.cli import from_yaml
from megavlm.config.image_text import ImageText
from megavlm.config.schema import Config, Data
from megavlm.convert.hf import blip2_config, convert
from megavlm.convert.hf.blip2_retrieval import CLASS_NAME
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.loading.batch import BatchOptions
from tests.convert.blip2_models import STAGE1 as MODEL
from tests.convert.card import run_example
from tests.convert.models import TOKENIZER, load_all
from tests.data.pair_tokenizer import make_pair_tokenizer
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for

TEXTS = MODEL.image_text.text_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model of which every weight differs from its fresh value."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    out = tmp_path_factory.mktemp("models") / "hf"
    settings = blip2_config.write_parts(MODEL) | {"image_text_hidden_size": MODEL.image_text.size}
    torch.manual_seed(4)
    model = Blip2ForImageTextRetrieval(Blip2Config.from_dict(json.loads(json.dumps(settings))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    pixels = {"image_mean": MODEL.vision.pixel_mean, "image_std": MODEL.vision.pixel_std}
    (out / "preprocessor_config.json").write_text(json.dumps(pixels))
    return out


def config_of(packs: Path) -> Config:
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    config = config_for(packs, trainable=("connector", "objective"))
    return dataclasses.replace(config, architecture=MODEL, recipe="blip2", data=data)


def scores_of_pack(config: Config, folder: Path) -> dict[str, np.ndarray]:
    """Return both scores of the pairs of a pack, and what they are scores of."""
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.model import weights
    from megavlm.model.objective.qformer import similarities, texts_of
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout

    backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    model = VisionLanguageModel(config, layout, groups).eval()
    weights.fill([model], convert.full_tensors(folder, config.architecture))
    layers = config.architecture.vision.num_layers
    batch = PackedDataset(config.data.train).batch(0, 0, BatchOptions(vision_layers=layers))
    with torch.no_grad():
        images, texts, _, hidden = model(batch)
        ids, lengths = texts_of(batch, TEXTS)
        found = {
            "contrast": similarities(images, texts),
            "matching": model.objective._match(ids, lengths, hidden),
            "ids": ids,
            "lengths": lengths,
            "tiles": batch.tiles[: len(ids)],
        }
    process_groups.destroy()
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_scores_of_contrast_and_matching_equal_those_of_transformers(
    ranks: Pool, folder: Path, tmp_path: Path
) -> None:
    from transformers import Blip2ForImageTextRetrieval

    packs = tmp_path / "packs"
    sizes = dict(vocab_size=MODEL.connector.qformer.vocab_size, context_token_id=7, tile_size=15)
    pairs = dict(image_share=1.0, grids=((1, 1),), features_per_tile=0, text_tokens=(4, TEXTS))
    make_dataset(packs, packs=1, capacity=64, samples_per_pack=4, **sizes, **pairs)
    [ours] = ranks.run(scores_of_pack, 1, config_of(packs), folder)
    assert len(ours["ids"]) > 1 and len(set(ours["lengths"])) > 1
    model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    vision = MODEL.vision
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.pixel_mean, vision.pixel_std))
    inputs = dict(
        pixel_values=(torch.from_numpy(ours["tiles"]) / 255 - mean) / std,
        input_ids=torch.from_numpy(ours["ids"]),
        attention_mask=(np.arange(TEXTS) < ours["lengths"][:, None]).astype(np.int64),
    )
    inputs["attention_mask"] = torch.from_numpy(inputs["attention_mask"])
    with torch.no_grad():
        matching = model(**inputs, use_image_text_matching_head=True).logits_per_image
        # One text for all images each: transformers multiplies images with texts of a batch.
        contrast = torch.stack(
            [
                model(
                    **{
                        name: value[[row] * len(value)] if name == "pixel_values" else value
                        for name, value in inputs.items()
                    }
                ).logits_per_image[0]
                for row in range(len(ours["ids"]))
            ]
        )
    assert np.abs(ours["matching"] - matching.numpy()).max() <= 1e-4
    assert np.abs(ours["contrast"] - contrast.numpy()).max() <= 1e-4


def test_import_then_export_is_bit_identical_and_keeps_what_has_no_place(
    folder: Path, tmp_path: Path
) -> None:
    checkpoint = convert.import_(folder, tmp_path / "checkpoint", tokenizer=TOKENIZER)
    config = from_yaml(checkpoint / "config.yaml")
    default = dataclasses.replace(MODEL, image_text=ImageText(size=11))
    assert config.architecture == default and config.recipe == "blip2"
    out = convert.export(checkpoint, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == [CLASS_NAME]
    before = load_all(folder)
    after = load_all(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert architecture_from_hf(out) == default
    held = convert.hf_tensors_as_megatron(folder, default)
    assert float(held["objective.temperature"]) == pytest.approx(0.07)
    assert torch.equal(held["objective.transform.weight"], torch.eye(42))
    with pytest.raises(
        ValueError, match="objective next_token or preference; this model has qformer"
    ):
        convert.export(checkpoint, tmp_path / "other", dialect="blip2")


def test_transformers_loads_an_export_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from transformers import Blip2ForImageTextRetrieval

    words = make_pair_tokenizer(tmp_path / "words", ("a", "picture", "of", "cat", "dog"))
    checkpoint = convert.import_(folder, tmp_path / "checkpoint", tokenizer=words)
    out = convert.export(checkpoint, tmp_path / "out")
    _, info = Blip2ForImageTextRetrieval.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert run_example(out, monkeypatch, capsys).startswith("tensor([0.")
    assert "| language |" not in (out / "README.md").read_text()  # it has none
