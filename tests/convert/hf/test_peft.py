"""LoRA adapters between checkpoints and PEFT: on the exported base, merged, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from megavlm.config.cli import from_yaml, to_yaml
from megavlm.config.lora import MAGNITUDE, Lora, stacked
from megavlm.config.schema import Architecture
from megavlm.convert.dist_checkpoint import ShardsFolder, write_shards
from megavlm.convert.hf import convert, peft_export
from megavlm.convert.hf.hub_formats import HUB_FORMATS, dialect_of
from megavlm.convert.hf.reference import load_reference
from megavlm.convert.weights.adapters import MergedAdapters, adapted_rows
from megavlm.convert.weights.tables import llava_name_on_disk, rows
from megavlm.convert.weights.views import Header, HuggingFaceView
from megavlm.model.nf4 import rounded
from megavlm.planner.flops import pieces
from tests.convert.blip2_models import make_blip2, make_instructblip
from tests.convert.fuyu_models import make_fuyu
from tests.convert.idefics_models import make_idefics
from tests.convert.llava_models import make_llava
from tests.convert.llava_next_models import make_llava_next, make_llava_onevision
from tests.convert.models import NATIVE_KINDS, SMALL, make_hf
from tests.convert.pair_models import make_pair_model
from tests.convert.paligemma_models import make_paligemma
from tests.convert.qwen_vl_models import make_qwen2_5_vl, make_qwen2_vl, make_qwen3_vl
from tests.ranks.layouts import asks_for_all

TARGETS = ("language", "vision.*.self_attention", "vision.encoder.layers.1.mlp")
CONNECTOR = "connector.mlp.linear_fc1.weight"
# Linear layers of the vision encoder without an adapter.
_NOT_ADAPTED = ("layer.0.mlp.fc1.weight", "layer.0.mlp.fc2.weight")


class Edited:
    """Tensors of a checkpoint, some of them replaced and some added."""

    def __init__(self, source: ShardsFolder, edits: dict[str, Tensor]):
        self._source = source
        self._edits = edits
        added = {key: Header(tuple(value.shape), value.dtype) for key, value in edits.items()}
        self.headers = dict(source.headers) | added

    def __getitem__(self, key: str) -> Tensor:
        return self._edits[key] if key in self._edits else self._source[key]

    def ranges(self, key: str, rows: range) -> None:
        return None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the model that adapters are trained on, in float32."""
    return make_base(tmp_path_factory.mktemp("peft") / "base", SMALL)


def make_base(folder: Path, architecture: Architecture) -> Path:
    """Make a model in float32."""
    model = InternVLForConditionalGeneration.from_pretrained(
        make_hf(folder.parent / "first", architecture), dtype=torch.float32
    )
    make_hf(folder, architecture)
    with torch.no_grad():  # attention that is no choice of one token, so that rounding stays small
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.squeeze().ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return folder


def checkpoint_of(base: Path, folder: Path, lora: Lora, *, trained: str = "") -> Path:
    """Write a checkpoint with random adapters, as training leaves one.

    Args:
        base: the model that they were trained on.
        folder: to make.
        lora: settings of the adapters.
        trained: key of a weight beside them that was trained, if any.
    """
    convert.import_(base, folder)
    (folder / "shards").rename(folder.parent / "plain")
    plain = ShardsFolder(folder.parent / "plain")
    config = from_yaml(folder / "config.yaml")
    architecture = replace(config.architecture, lora=lora)
    generator = torch.Generator().manual_seed(7)
    edits: dict[str, Tensor] = {}
    for piece in pieces(architecture):
        if piece.key.endswith(".lora.a"):
            weight = piece.key.removesuffix(".lora.a") + ".weight"
            rows = lora.rank * stacked(architecture, weight)
            shape = (rows, piece.elements // rows)
        elif piece.key.endswith(".lora.b"):
            shape = (piece.elements // lora.rank, lora.rank)
        elif piece.key.endswith(MAGNITUDE):
            edits[piece.key] = 0.5 + torch.rand(piece.elements, generator=generator)
            continue
        else:
            continue
        edits[piece.key] = 0.2 * torch.randn(shape, generator=generator)
    for key in plain.headers:
        if lora.quantises(key):  # as checkpoints hold weights that training has in 4 bits
            edits[key] = rounded(plain[key])
    if trained:
        edits[trained] = plain[trained] + 0.1
    write_shards(Edited(plain, edits), folder / "shards")
    (folder / "config.yaml").write_text(to_yaml(replace(config, architecture=architecture)))
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inner = getattr(model, "base_model", model)
    token = inner.config.image_token_id if hasattr(inner, "config") else 0
    ids = torch.randint(20, 400, (1, 24), generator=generator)
    ids[ids == token] = 21
    ids[0, 4 : 4 + SMALL.features_per_tile] = token
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


def load(folder: Path) -> InternVLForConditionalGeneration:
    return InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("trains_connector", "is_dora"), [(True, False), (False, False), (True, True)]
)
def test_peft_gives_the_logits_of_the_merged_export(
    base: Path, tmp_path: Path, trains_connector: bool, is_dora: bool
) -> None:
    lora = Lora(rank=4, alpha=12.0, targets=TARGETS, dora=is_dora)
    key = CONNECTOR if trains_connector else ""
    trained = checkpoint_of(base, tmp_path / "trained", lora, trained=key)
    convert.export(trained, tmp_path / "merged", tokenizer=base, dialect="native")
    peft_export.export(trained, tmp_path / "adapters", base=base)
    merged = logits(load(tmp_path / "merged"))
    on_base = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapters"))
    before = logits(load(base))
    assert (merged - on_base).abs().max() < 1e-4 < 1e-2 < (merged - before).abs().max()
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (saved["modules_to_save"] is not None) == trains_connector
    assert saved["use_dora"] == is_dora
    assert len(saved["target_modules"]) == 3 * 7 + 2 * 4 + 2

    # And back: every tensor returns bit for bit.
    convert.import_(base, tmp_path / "again", adapters=tmp_path / "adapters")
    first = ShardsFolder(trained / "shards")
    second = ShardsFolder(tmp_path / "again" / "shards")
    assert first.headers.keys() == second.headers.keys()
    assert all(torch.equal(first[key], second[key]) for key in first.headers)
    found = from_yaml(tmp_path / "again" / "config.yaml").architecture.lora
    assert (found.rank, found.scale, found.dora) == (4, 3.0, is_dora)
    assert "language.decoder.layers.*.self_attention.linear_qkv" in found.targets


FAMILIES = [("phi3", 4), ("persimmon", 4)]
FAMILIES += [("gemma2", 7)] if asks_for_all() else []


@pytest.mark.parametrize(("family", "modules"), FAMILIES)
def test_families_with_other_projections_are_merged_as_peft_merges_them(
    tmp_path: Path, family: str, modules: int
) -> None:
    architecture = NATIVE_KINDS[family]
    base = make_base(tmp_path / "base", architecture)
    lora = Lora(rank=4, alpha=12.0, targets=("language",))
    trained = checkpoint_of(base, tmp_path / "trained", lora)
    convert.export(trained, tmp_path / "merged", tokenizer=base, dialect="native")
    peft_export.export(trained, tmp_path / "adapters", base=base)
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert len(saved["target_modules"]) == 3 * modules
    merged = logits(load(tmp_path / "merged"))
    on_base = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapters"))
    before = logits(load(base))
    assert (merged - on_base).abs().max() < 1e-4 < 1e-2 < (merged - before).abs().max()
    convert.import_(base, tmp_path / "again", adapters=tmp_path / "adapters")
    first = ShardsFolder(trained / "shards")
    second = ShardsFolder(tmp_path / "again" / "shards")
    assert first.headers.keys() == second.headers.keys()
    assert all(torch.equal(first[key], second[key]) for key in first.headers)


@pytest.mark.parametrize(
    ("modules", "is_dora"),
    [("q_proj|v_proj|down_proj", False), ("q_proj|k_proj|v_proj|o_proj|down_proj", True)],
)
def test_adapters_that_peft_has_made_are_imported(
    base: Path, tmp_path: Path, modules: str, is_dora: bool
) -> None:
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        use_dora=is_dora,
        target_modules=rf".*language_model.*\.({modules})",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base), settings)
    model.save_pretrained(tmp_path / "adapters")
    wanted = logits(model)
    convert.import_(base, tmp_path / "start", adapters=tmp_path / "adapters")
    convert.export(tmp_path / "start", tmp_path / "merged", dialect="native")
    assert (logits(load(tmp_path / "merged")) - wanted).abs().max() < 1e-4


def test_adapters_of_experts_are_merged_and_not_written_for_peft(tmp_path: Path) -> None:
    architecture = NATIVE_KINDS["qwen3_moe"]
    base = make_base(tmp_path / "base", architecture)
    lora = Lora(rank=4, alpha=12.0, targets=("language.*.experts",))
    trained = checkpoint_of(base, tmp_path / "trained", lora)
    convert.export(trained, tmp_path / "merged", tokenizer=base, dialect="native")
    source = ShardsFolder(trained / "shards")
    plain, merged = (load(folder) for folder in (base, tmp_path / "merged"))
    before = logits(plain)
    # By hand, into the tensors in which transformers holds the experts of a layer.
    with torch.no_grad():
        for number, layer in enumerate(plain.model.language_model.layers):
            for expert in range(5):
                stem = f"language.decoder.layers.{number}.mlp.experts.{expert}"
                a, b, a2, b2 = (
                    source[f"{stem}.{name}.lora.{factor}"]
                    for name in ("linear_fc1", "linear_fc2")
                    for factor in ("a", "b")
                )
                first = [b[:20] @ a[:4], b[20:] @ a[4:]]
                layer.mlp.experts.gate_up_proj[expert] += 3 * torch.cat(first)
                layer.mlp.experts.down_proj[expert] += 3 * b2 @ a2
    assert (logits(merged) - logits(plain)).abs().max() < 1e-4
    assert (logits(merged) - before).abs().max() > 1e-2
    held = dict(load(base).named_parameters())
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, held[name]) != (".mlp.experts." in name), name
    with pytest.raises(ValueError, match="one A for gate and up; leave --peft out"):
        peft_export.export(trained, tmp_path / "adapters", base=base)


def test_what_is_no_adapter_of_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    trained = checkpoint_of(base, tmp_path / "trained", Lora(rank=2, targets=("*.linear_proj",)))
    folder = peft_export.export(trained, tmp_path / "adapters", base=base)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    make_hf(other := tmp_path / "other", SMALL)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights beside the adapters and the connector are not"):
        peft_export.export(trained, tmp_path / "wrong", base=other)
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        peft_export.export(convert.import_(base, tmp_path / "whole"), tmp_path / "wrong", base=base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="lora_magnitude_vector: is missing, must be"):
        convert.import_(base, tmp_path / "wrong", adapters=folder)
    for key, value in (("init_lora_weights", "pissa"), ("layer_replication", [[0, 2]]), ("r", 0)):
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"adapter_config.json: {key} is "):
            convert.import_(base, tmp_path / "wrong", adapters=folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.x": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 tensors are no adapters of linear layers"):
        convert.import_(base, tmp_path / "wrong", adapters=folder)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_B.weight is there, and .*lora_A.weight is missing"):
        convert.import_(base, tmp_path / "wrong", adapters=folder)


def make_pairs(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """Write a random CLIP or SigLIP."""
    model = make_pair_model(kind, vocab_size=199, positions=16, begin=1, end=2, noise=0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


CLASSES: dict[str, tuple[Callable[..., Path], str, str]] = {
    "llava": (make_llava, CONNECTOR, "model.multi_modal_projector"),
    "llava_next": (make_llava_next, CONNECTOR, "model.multi_modal_projector"),
    "llava_onevision": (make_llava_onevision, CONNECTOR, "model.multi_modal_projector"),
    "paligemma": (make_paligemma, "connector.linear.weight", "model.multi_modal_projector"),
    "fuyu": (make_fuyu, "connector.linear.weight", "model.vision_embed_tokens"),
    "qwen2_vl": (make_qwen2_vl, CONNECTOR, "model.visual.merger"),
    "qwen2_5_vl": (make_qwen2_5_vl, CONNECTOR, "model.visual.merger"),
    "qwen3_vl": (make_qwen3_vl, CONNECTOR, "model.visual.merger"),
    "blip2": (make_blip2, "connector.output.weight", "language_projection"),
    "instructblip": (make_instructblip, "connector.output.weight", "language_projection"),
    "clip": (
        partial(make_pairs, kind="clip"),
        "connector.projection.weight",
        "visual_projection",
    ),
    "siglip": (
        partial(make_pairs, kind="siglip"),
        "objective.text_projection.weight",
        "text_model.head",
    ),
    "idefics": (
        make_idefics,
        "language.decoder.layers.0.cross.linear_q.weight",
        "model.gated_cross_attn_layers.0",
    ),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters_of_every_class_are_those_that_peft_merges(tmp_path: Path, kind: str) -> None:
    make, key, module = CLASSES[kind]
    base = make(tmp_path / "base", dtype=torch.float32)
    parts = ("language",) if kind == "fuyu" else ("language", "vision.encoder.layers.1")
    lora = Lora(rank=4, alpha=12.0, targets=parts)
    trained = checkpoint_of(base, tmp_path / "trained", lora, trained=key)
    peft_export.export(trained, tmp_path / "adapters", base=base)
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == [module]
    plain = load_reference(base)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters").merge_and_unload()
    architecture = from_yaml(trained / "config.yaml").architecture
    dialect = dialect_of(base)
    source = MergedAdapters(ShardsFolder(trained / "shards"), architecture, dialect)
    merged = HuggingFaceView(source, architecture, None, dialect=dialect)
    changed = {row.key for row in adapted_rows(architecture, dialect)} | {key}
    rows_of = {name: row.key for row in rows(architecture, dialect) for name in row.names}
    name_on_disk = HUB_FORMATS[dialect].name_on_disk
    seen = set()
    for name, tensor in by_peft.state_dict().items():
        on_disk = name_on_disk(name)
        if on_disk in rows_of:
            seen.add(on_disk)
            assert (tensor - merged[on_disk]).abs().max() < 1e-5, name
            is_same = torch.equal(tensor, before[name])
            assert is_same == (rows_of[on_disk] not in changed), name
    assert seen == rows_of.keys()
    # And back: every tensor returns bit for bit.
    convert.import_(base, tmp_path / "again", adapters=tmp_path / "adapters")
    first, second = (ShardsFolder(folder / "shards") for folder in (trained, tmp_path / "again"))
    assert first.headers.keys() == second.headers.keys()
    assert all(torch.equal(first[one], second[one]) for one in first.headers)


def test_adapters_that_peft_has_made_of_a_llava_are_imported(tmp_path: Path) -> None:
    base = make_llava(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    # In the last layer of CLIP too, which LLaVA does not compute.
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(load_reference(base), settings)
    model.save_pretrained(tmp_path / "adapters")
    imported = convert.import_(base, tmp_path / "start", adapters=tmp_path / "adapters")
    architecture = from_yaml(imported / "config.yaml").architecture
    source = MergedAdapters(ShardsFolder(imported / "shards"), architecture, "llava")
    merged = HuggingFaceView(source, architecture, None, dialect="llava")
    by_peft = {
        llava_name_on_disk(name): tensor
        for name, tensor in model.merge_and_unload().state_dict().items()
    }
    for name in merged.headers:
        assert (by_peft[name] - merged[name]).abs().max() < 1e-5, name


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = make_llava_next(tmp_path / "base", dtype=torch.float32)
    lora = Lora(rank=2)
    trained = checkpoint_of(base, tmp_path / "trained", lora, trained="connector.newline")
    with pytest.raises(ValueError, match="image_newline was trained, which is a parameter of no"):
        peft_export.export(trained, tmp_path / "adapters", base=base)
    assert not (tmp_path / "adapters").exists()


def test_adapters_of_weights_in_4_bits_are_exported_both_ways(base: Path, tmp_path: Path) -> None:
    lora = Lora(rank=4, targets=TARGETS, nf4=("language", "vision"))
    trained = checkpoint_of(base, tmp_path / "trained", lora)
    convert.export(trained, tmp_path / "merged", tokenizer=base, dialect="native")
    peft_export.export(trained, tmp_path / "adapters", base=base)
    # Merged is what was trained: the base as it is in 4 bits, with the adapters.
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapters")
    on_base = logits(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_linear = ".layers." in name or ".layer." in name
            if (is_linear and "base_layer.weight" in name) or name.endswith(_NOT_ADAPTED):
                weight.copy_(rounded(weight))
    merged = logits(load(tmp_path / "merged"))
    assert (merged - logits(model)).abs().max() < 1e-4 < (merged - on_base).abs().max()
    plain = Lora(rank=4, targets=TARGETS)
    config = from_yaml(trained / "config.yaml")
    other = replace(config, architecture=replace(config.architecture, lora=plain))
    (trained / "config.yaml").write_text(to_yaml(other))
    with pytest.raises(ValueError, match="are not those of the checkpoint"):
        peft_export.export(trained, tmp_path / "refused", base=base)
