"""Runs that start from parts: what CLIP and SigLIP see, a model of LLaVA's shape, and a job from
two folders.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megavlm.config.schema import Architecture, Checkpoint, Config, Init, Logging
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_sources
from megavlm.data.text.tokenizer import SPECIAL_TOKENS
from tests.convert.models import SMALL, load_all
from tests.convert.part_folders import WORDS, make_language, make_parts, make_tokenizer, make_vision
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for
from tests.ranks.test_resume import run_job
from tests.ranks.test_whole_way import write_records

CONTEXT = WORDS + 2


def _config(architecture: Architecture, init: Init, dataset: Path, **settings) -> Config:
    return dataclasses.replace(
        config_for(dataset, steps=2, **settings), architecture=architecture, init=init
    )


def features(config: Config, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Encode tiles [I, 3, S, S] with a model that starts from parts; return features [I, N, D] and
    the normalised pixels.
    """
    from megavlm.convert.hf import from_parts
    from megavlm.model import weights
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout

    backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    model = VisionLanguageModel(config, layout, groups).eval()
    weights.fill([model], from_parts.full_tensors(config, weights.fresh_tensor(config)))
    with torch.no_grad():
        found = model.vision(None, tiles, None).transpose(0, 1), model.vision.normalise(tiles)
    process_groups.destroy()
    return found


def seen_by_transformers(folder: Path, pixels: Tensor) -> Tensor:
    """Compute the input of the last layer, as LLaVA takes it; of EVA the output of the last, before
    the norm, as BLIP-2 takes it.
    """
    from transformers import AutoConfig, Blip2VisionModel, CLIPVisionModel, SiglipVisionModel

    name = AutoConfig.from_pretrained(folder).model_type
    kind = SiglipVisionModel if "siglip" in name else CLIPVisionModel
    if name == "blip_2_vision_model":
        kind = Blip2VisionModel
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind is Blip2VisionModel:
            return model.encoder(model.embeddings(pixels)).last_hidden_state
        return model(pixels, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("kind", ["clip", "siglip", "clip with text", "eva"])
def test_encoders_see_what_they_see_in_transformers(ranks: Pool, tmp_path: Path, kind: str) -> None:
    from megavlm.convert.hf import from_parts

    vision = make_vision(tmp_path / "vision", kind)
    words = make_language(tmp_path / "language")
    init = Init(vision=str(vision), language=str(words))
    architecture = from_parts.read_model("", init)
    size = architecture.vision.image_size
    tiles = torch.randint(
        0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for tensor_size in (1, 2):
        config = _config(architecture, init, tmp_path, tensor_model_parallel_size=tensor_size)
        ours, pixels = ranks.run(features, tensor_size, config, tiles)[0]
        theirs = seen_by_transformers(vision, pixels)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4, tensor_size


def logits_of_parts(config: Config) -> np.ndarray:
    """Logits of the first pack [T, V of this rank's share] of a model that starts from parts."""
    from megavlm.convert.hf import from_parts
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.model import weights
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout

    backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    model = VisionLanguageModel(config, layout, groups).eval()
    weights.fill([model], from_parts.full_tensors(config, weights.fresh_tensor(config)))
    batch = PackedDataset(config.data.train).batch(
        0, 0, BatchOptions(vision_layers=config.architecture.vision.num_layers)
    )
    with torch.no_grad():
        logits = model(batch, with_loss=False)
    process_groups.destroy()
    return logits.numpy()


def llava(vision: Path, words: Path, config: Config) -> torch.nn.Module:
    """Build the same model in transformers, with the connector that the trainer initialises."""
    from transformers import (
        AutoModelForCausalLM,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from megavlm.model import weights

    eyes = CLIPVisionModel.from_pretrained(vision)
    language = AutoModelForCausalLM.from_pretrained(words)
    settings = dict(
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_id=CONTEXT,
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes.config, text_config=language.config, **settings)
    ).eval()
    model.model.vision_tower.load_state_dict(eyes.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    drawn = weights.fresh_tensor(config)
    arch = config.architecture
    width = arch.language.hidden_size
    inside = arch.vision.hidden_size
    for number, shape in ((1, (width, inside)), (2, (width, width))):
        layer = model.get_submodule(f"model.multi_modal_projector.linear_{number}")
        layer.weight.data.copy_(drawn(f"connector.mlp.linear_fc{number}.weight", shape))
        layer.bias.data.zero_()
    return model


def test_a_model_of_llavas_shape_equals_llava_of_transformers(ranks: Pool, tmp_path: Path) -> None:
    from megavlm.convert.hf import from_parts
    from megavlm.data.loading.dataset import PackedDataset

    vision = make_vision(tmp_path / "vision", "clip")
    words = make_language(tmp_path / "language", rows=WORDS + len(SPECIAL_TOKENS), spread=0.1)
    make_tokenizer(words, SPECIAL_TOKENS)
    init = Init(vision=str(vision), language=str(words))
    architecture = from_parts.read_model("", init)
    sizes = dict(
        vocab_size=architecture.language.vocab_size, tile_size=architecture.vision.image_size
    )
    make_dataset(
        tmp_path / "packs",
        packs=1,
        context_token_id=CONTEXT,
        features_per_tile=architecture.features_per_tile,
        **sizes,
    )
    config = _config(architecture, init, tmp_path / "packs")
    batch = PackedDataset(tmp_path / "packs").batch(0, 0)
    other = llava(vision, words, config)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    pixels = (batch.tiles / 255 - mean) / std
    ends = batch.sample_ends.tolist()
    for tensor_size in (1, 2):
        parallel = config_for(tmp_path, tensor_model_parallel_size=tensor_size).parallel
        shares = ranks.run(
            logits_of_parts, tensor_size, dataclasses.replace(config, parallel=parallel)
        )
        ours = torch.from_numpy(np.concatenate(shares, axis=-1))[
            :, : architecture.language.vocab_size
        ]
        tile = 0
        for start, end in zip(ends[:-2], ends[1:-1], strict=True):
            count = (
                int((batch.tokens[start:end] == CONTEXT).sum()) // architecture.features_per_tile
            )
            inputs = {"pixel_values": pixels[tile : tile + count]} if count else {}
            with torch.no_grad():
                theirs = other(input_ids=batch.tokens[None, start:end], **inputs).logits[0]
            tile += count
            assert (ours[start:end] - theirs).abs().max() <= 1e-4 and torch.equal(
                ours[start:end].argmax(-1), theirs.argmax(-1)
            )
        assert tile == len(batch.tiles) > 0


@pytest.fixture(scope="module")
def parts_and_packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Init, Path]:
    """Make an InternViT, a language model, and packs with the language model's own tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    _, vision, words = make_parts(folder, SMALL)
    sources = read_sources(None, str(write_records(folder)), str(folder))
    tiling = Tiling(tile_size=28, min_tiles=1, max_tiles=4, thumbnail=True)
    pack_dataset(
        Job(
            sources=sources,
            tokenizer=str(words),
            out=str(folder / "packs"),
            capacity=512,
            features_per_tile=4,
            tiling=tiling,
        )
    )
    return Init(vision=str(vision), language=str(words)), folder / "packs"


def test_stage_1_starts_from_parts_goes_on_by_itself_and_ends_in_hugging_face(
    ranks: Pool, parts_and_packs: tuple[Init, Path], tmp_path: Path
) -> None:
    from megavlm.convert.hf import from_parts
    from megavlm.convert.hf.reference import load_reference

    init, packs = parts_and_packs
    architecture = from_parts.read_model("", init)
    losses = {}
    for size, heads in ((1, 3), (2, 3)):
        config = _config(
            architecture,
            init,
            packs,
            global_batch_size=2,
            tensor_model_parallel_size=size,
            trainable=("connector",),
        )
        files = Checkpoint(
            save=str(tmp_path / f"run{size}"),
            save_interval=1,
            export_hf=str(tmp_path / f"hf{size}"),
        )
        config = dataclasses.replace(
            config, stage="1", checkpoint=files, logging=Logging(interval=1)
        )
        assert ranks.run(run_job, size, config) == [2] * size and heads % size == size - 1
        losses[size] = read_losses(tmp_path / f"run{size}")
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    trained = load_reference(tmp_path / "hf1").state_dict()
    before = load_all(Path(init.vision))
    assert torch.equal(
        trained["model.vision_tower.embeddings.cls_token"],
        before["embeddings.class_embedding"].float(),
    )
    longer = dataclasses.replace(
        config, training=replace(config.training, steps=3), checkpoint=replace(files, export_hf="")
    )
    assert ranks.run(run_job, 2, longer) == [3] * 2 and len(read_losses(tmp_path / "run2")) == 3


def test_parts_below_a_checkpoint_are_read_where_they_are(
    ranks: Pool, parts_and_packs: tuple[Init, Path], tmp_path: Path
) -> None:
    from megavlm.convert.hf import from_parts

    (init, packs) = parts_and_packs
    parts = {name: tmp_path / "runs" / name for name in ("vision", "language")}
    for name, folder in parts.items():
        shutil.copytree(vars(init)[name], folder)
    init = Init(vision=str(parts["vision"]), language=str(parts["language"]))
    architecture = from_parts.read_model("", init)
    save = tmp_path / "runs" / "run"
    files = Checkpoint(save=str(save), save_interval=1, trained_only=True, keep=0)
    config = _config(architecture, init, packs, global_batch_size=2, trainable=("connector",))
    config = replace(config, stage="1", checkpoint=files, logging=Logging(interval=1))
    ranks.run(run_job, 1, config)
    shutil.rmtree(save / "step_00000002")
    (save / "latest").write_text("step_00000001\n")
    expected = read_losses(save)[1]
    (save / "metrics.jsonl").unlink()
    (tmp_path / "runs").rename(tmp_path / "moved")  # as seen from the run they are where they were
    moved = replace(files, save=str(tmp_path / "moved" / "run"))
    ranks.run(run_job, 1, replace(config, init=Init(), checkpoint=moved))
    assert read_losses(tmp_path / "moved" / "run") == [expected]


def test_packs_of_another_tokenizer_are_refused(
    parts_and_packs: tuple[Init, Path], tmp_path: Path
) -> None:
    from megavlm.convert.hf import from_parts
    from megavlm.train import inspection

    init, packs = parts_and_packs
    architecture = from_parts.read_model("", init)
    other = make_language(tmp_path / "other")
    make_tokenizer(other, ("more",))
    config = _config(architecture, replace(init, language=str(other)), packs)
    config = replace(
        config,
        checkpoint=Checkpoint(save_interval=0),
        architecture=replace(
            architecture, language=from_parts.language_from_hf(Init(language=str(other)))
        ),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"--data.train .*packs: packed with another tokenizer than that of --init.language"
            r" .*other"
        ),
    ):
        inspection.inspect(config, 1)


def read_losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
