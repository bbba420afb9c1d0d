"""InternVL-C: the similarities of its parts in transformers, its folders, its stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel

from megavlm.config.cli import parse
from megavlm.config.connectors import Connector
from megavlm.config.recipes import recipe
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import convert, native_config
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.families import internvit
from megavlm.evaluate.run import _of_folder
from megavlm.model_source import read_model
from tests.convert.card import run_example
from tests.data.pair_tokenizer import make_pair_tokenizer
from tests.ranks.model_checks import recipe_config
from tests.ranks.pool import Pool
from tests.ranks.test_contrastive import assert_same, pack_pairs, run
from tests.ranks.test_pairs_convert import END, make_pairs, similarities

SMALL = dataclasses.replace(
    recipe("internvl_c").architecture,
    vision=Vision(
        image_size=16,
        patch_size=4,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        normalization="RMSNorm",
        qkv_bias=False,
        qk_norm=True,
    ),
    connector=Connector(kind="mean_query", heads=2),
    language=Language(
        family="llama",
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=199,
        rotary_base=1e4,
        max_position_embeddings=256,
        qkv_bias=False,
    ),
    contrastive=dataclasses.replace(recipe("internvl_c").architecture.contrastive, size=20),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model as an export does."""
    root = tmp_path_factory.mktemp("internvl_c")
    return write_random(root / "hf", SMALL)


def write_random(out: Path, architecture: Architecture) -> Path:
    from megavlm.convert.hf.hub_formats import HUB_FORMATS
    from megavlm.convert.hf.part_folders import write_parts
    from megavlm.convert.hf.preprocessing import Usage
    from megavlm.convert.weights.tables import rows

    form = HUB_FORMATS["internvl_c"]
    words = make_pair_tokenizer(out.parent / "words", ("a", "b"))
    out.mkdir()
    usage = Usage(template="internvl_c", system_message="", max_tiles=1, tiling="stretch")
    form.write_files(out, words, architecture, usage, torch.float32)
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for row in rows(architecture, "internvl_c"):
        for name, shape in zip(row.names, row.part_shapes, strict=True):
            tensors[name] = torch.randn(shape, generator=generator) * 0.2
    write_parts(_Held(tensors), out, form.folders, 10**9)
    return out


class _Held:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        from megavlm.convert.weights.views import Header

        self._tensors = tensors
        self.headers = {name: Header(tuple(one.shape), one.dtype) for name, one in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def ranges(self, name: str, rows: range) -> None:
        return None


def embed_images(folder: Path, vision: Vision, pixels: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Return what transformers' InternViT and a pool written out give."""
    settings = native_config._vision_config(vision)
    model = InternVLVisionModel(InternVLVisionConfig.from_dict(settings | {"hidden_act": "gelu"}))
    named = load_file(folder / "vision" / "model.safetensors")
    by_key = {
        row.key: row.join([named[name] for name in row.names])
        for row in internvit.rows(vision, internvit.CHAT)
    }
    native = {
        name: part
        for row in internvit.rows(vision, internvit.NATIVE)
        for name, part in row.split(by_key[row.key]).items()
    }
    missing, unexpected = model.load_state_dict(native, strict=False)
    assert not unexpected and not [name for name in missing if "mask_token" not in name]
    hidden = model.eval()(pixels).last_hidden_state
    pool = {name.removeprefix("clip_projector."): value for name, value in head.items()}
    width = hidden.shape[-1]

    def part(short: str, source: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(
            source, (width,), pool[f"norm1_{short}.weight"], pool[f"norm1_{short}.bias"], 1e-5
        )
        made = normed @ pool[f"cross_attn.{short}.weight"].T + pool[f"cross_attn.{short}_bias"]
        return made.unflatten(-1, (2, -1)).transpose(1, 2)

    query = part("q", hidden.mean(1, keepdim=True))
    key = part("k", hidden)
    value = part("v", hidden)
    weights = (query @ key.transpose(-1, -2) / (width // 2) ** 0.5).softmax(-1)
    pooled = (weights @ value).transpose(1, 2).flatten(1)
    return pooled @ pool["cross_attn.proj.weight"].T + pool["cross_attn.proj.bias"]


def test_similarities_are_those_of_its_parts_in_transformers(
    ranks: Pool, folder: Path, tmp_path: Path
) -> None:
    texts, tiles = make_pairs(tmp_path / "packs", "clip")
    architecture = architecture_from_hf(folder)
    assert architecture == SMALL
    head = load_file(folder / "model.safetensors")
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (SMALL.vision.pixel_mean, SMALL.vision.pixel_std)
    )
    language = AutoModel.from_pretrained(folder / "language", dtype=torch.float32).eval()
    tokens = torch.from_numpy(texts)
    last = (tokens != END).sum(dim=1)  # of a text filled up with its last token
    with torch.no_grad():
        images = embed_images(
            folder, SMALL.vision, (torch.from_numpy(tiles) / 255 - mean) / std, head
        )
        hidden = language(input_ids=tokens).last_hidden_state[torch.arange(4), last]
        unit = [nn.functional.normalize(one) for one in (hidden @ head["text_projection"], images)]
        expected = (head["logit_scale"].exp() * unit[0] @ unit[1].T).numpy()
    for world, layout in ((1, {}), (2, {"tensor_model_parallel_size": 2})):
        config = recipe_config("internvl_c", SMALL, tmp_path / "packs", **layout)
        data = dataclasses.replace(config.data, loss_reduction="sample")
        config = dataclasses.replace(config, data=data)
        for found in ranks.run(similarities, world, config, str(folder)):
            assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_an_import_is_exported_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checks = convert.check(folder)
    assert [one.changed for one in checks] == [()] * len(checks)
    checkpoint = convert.import_(folder, tmp_path / "start")
    out = convert.export(checkpoint, tmp_path / "out")
    for name in ("", "vision", "language"):
        before = load_file(folder / name / "model.safetensors")
        after = load_file(out / name / "model.safetensors")
        assert before.keys() == after.keys() and len(before) > 2
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        settings = [json.loads((one / name / "config.json").read_text()) for one in (folder, out)]
        assert settings[0] == settings[1]
    assert architecture_from_hf(out) == SMALL
    assert run_example(out, monkeypatch, capsys).startswith("tensor([[")
    with pytest.raises(ValueError, match="CLIPModel has --architecture.vision.family"):
        convert.export(checkpoint, tmp_path / "clip", dialect="clip")


def test_its_parts_start_other_models(folder: Path) -> None:
    from megavlm.config.schema import Init, Training
    from megavlm.convert.hf import from_parts

    init = Init(vision=str(folder / "vision"), language=str(folder / "language"))
    found = from_parts.read_model("", init, SMALL)
    assert found.vision == SMALL.vision and not found.language.tied_head
    whole = convert.hf_tensors_as_megatron(folder, SMALL)
    model = dataclasses.replace(SMALL, language=dataclasses.replace(SMALL.language, vocab_size=199))
    config = recipe_config("internvl_c", model, folder)
    config = dataclasses.replace(config, init=init, training=Training())
    served = from_parts.full_tensors(config, lambda key, shape: torch.zeros(shape))
    for key in ("vision.class_token", "language.decoder.final_layernorm.weight"):
        index = tuple(slice(0, size) for size in whole[key].shape)
        assert torch.equal(served(key, whole[key].shape)[index], whole[key])
    talking = dataclasses.replace(
        config, architecture=dataclasses.replace(model, objective="next_token")
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        from_parts.full_tensors(talking, lambda key, shape: torch.zeros(shape))


def test_a_folder_is_evaluated_at_its_own_image_size(folder: Path) -> None:
    measuring = parse(_of_folder(folder), read_model)
    assert measuring.architecture.vision.image_size == SMALL.vision.image_size
    assert recipe("internvl_c").stages[measuring.stage].image_size == 364


def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "no_vision")
    shutil.rmtree(tmp_path / "no_vision" / "vision")
    with pytest.raises(FileNotFoundError, match="vision/config.json: no such file"):
        architecture_from_hf(tmp_path / "no_vision")
    shutil.copytree(folder, tmp_path / "no_pool")
    path = tmp_path / "no_pool" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "attn_pool_num_heads": None}))
    with pytest.raises(ValueError, match="attn_pool_num_heads is missing"):
        architecture_from_hf(tmp_path / "no_pool")
    shutil.copytree(folder, tmp_path / "no_weights")
    (tmp_path / "no_weights" / "language" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"language/model\.safetensors: no such file"):
        convert.check(tmp_path / "no_weights")


def test_it_trains_alike_at_every_layout(ranks: Pool, tmp_path: Path) -> None:
    pack_pairs(tmp_path / "packs", text_tokens=(4, 16), capacity=40)
    dropped = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, patch_drop=0.5))
    usual = dict(trainable=("vision", "connector", "language", "objective"), steps=3, adam_eps=1e-4)
    config = recipe_config("internvl_c", dropped, tmp_path / "packs", **usual, drop_path=0.2)
    data = dataclasses.replace(config.data, loss_reduction="sample")
    config = dataclasses.replace(config, data=data)
    one = ranks.run(run, 1, config)
    layouts = {
        "DP2, TP2": (4, dict(tensor_model_parallel_size=2, vision="data")),
        "PP2": (2, dict(pipeline_model_parallel_size=2, layout="v,v,c,t|t,h")),
    }
    for world, layout in layouts.values():
        parallel = dataclasses.replace(config.parallel, **layout)
        assert_same(one, ranks.run(run, world, dataclasses.replace(config, parallel=parallel)))
