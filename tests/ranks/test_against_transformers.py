"""The model against ``transformers``: the same logits from the same weights, in float32, at several
layouts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Architecture, Config
from tests.convert.chat import make_chat
from tests.convert.models import GEMMA, PERSIMMON
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for


def _model(vision: dict | None = None, **language) -> Architecture:
    found = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **(vision or {})))
    return dataclasses.replace(found, language=dataclasses.replace(TINY.language, **language))


# InternViT-6B's kind: an odd number of heads, and a norm over all of them.
SIX_B = dict(
    normalization="RMSNorm",
    qkv_bias=False,
    qk_norm=True,
    num_attention_heads=3,
    hidden_size=30,
    num_layers=2,
)
MODELS = {
    "qwen2": _model(),
    "qwen2 tied, three vision heads": _model(
        dict(num_attention_heads=3, hidden_size=36), tied_head=True, vocab_size=211
    ),
    "qwen3, InternViT-6B": _model(
        SIX_B,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        kv_channels=10,
        num_query_groups=1,
        vocab_size=256,
    ),
    "qwen3 tied": _model(
        family="qwen3", qkv_bias=False, qk_norm=True, num_query_groups=4, tied_head=True
    ),
    "llama": _model(family="llama", qkv_bias=False, num_query_groups=4, rotary_dynamic_factor=2.0),
    "mistral, InternViT-6B": _model(SIX_B, family="mistral", qkv_bias=False, kv_channels=6),
    "internlm2": _model(family="internlm2", qkv_bias=False, num_attention_heads=6, vocab_size=193),
    "gemma tied": _model(
        **GEMMA, tied_head=True, kv_channels=14, num_query_groups=1, vocab_size=211
    ),
    "persimmon": _model(**PERSIMMON, num_query_groups=4, vocab_size=193),
    "internlm3": _model(family="internlm3", qkv_bias=False, kv_channels=14, num_query_groups=1),
}
# Read in the format of OpenGVLab; the others in that of transformers.
CHAT = ("qwen2 tied, three vision heads", "qwen3, InternViT-6B", "internlm2", "internlm3")
LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}


def random_model(architecture: Architecture, context_token_id: int, folder: Path) -> None:
    """Write a random ``InternVLForConditionalGeneration`` whose every weight differs from its fresh
    value.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from megavlm.convert.hf import native_config

    settings = native_config.write(
        architecture,
        dtype=torch.float32,
        image_token_id=context_token_id,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    model = InternVLForConditionalGeneration(
        InternVLConfig.from_dict(json.loads(json.dumps(settings)))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def answers_of_pack(config: Config, folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """From the weights of a Hugging Face folder: logits of the first pack [T, V of this rank's
    share], and the losses of its tokens [T].

    None but from the last chunk.
    """
    from megavlm.convert.hf import convert
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.model import weights
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout

    backend.start(5)
    groups = process_groups.create(config.parallel, 0, make_layout(config).embedding_chunk)
    model = VisionLanguageModel(config, make_layout(config), groups).eval()
    weights.fill([model], convert.full_tensors(folder, config.architecture))
    batch = PackedDataset(config.data.train).batch(
        0, 0, vision_layers=config.architecture.vision.num_layers
    )
    answers = [
        _through_the_pipeline(model, batch, groups, with_loss=with_loss)
        for with_loss in (False, True)
    ]
    process_groups.destroy()
    return None if answers[0] is None else (answers[0].numpy(), answers[1].numpy())


@torch.no_grad()
def _through_the_pipeline(model, batch, groups, *, with_loss: bool) -> torch.Tensor | None:
    """Pass hidden states from chunk to chunk by hand: the schedules return the sum of the losses
    only.
    """
    import torch.distributed as dist

    group = dist.get_process_group_ranks(groups.collection.pp)
    if groups.pipeline_rank > 0:
        received: list = [None]
        dist.recv_object_list(received, src=group[groups.pipeline_rank - 1])
        model.set_input_tensor(received[0])
    output = model(batch, with_loss=with_loss)
    if not groups.has_last_chunk:
        dist.send_object_list([output], dst=group[groups.pipeline_rank + 1])
        return None
    return output.clone()


def answers_of_transformers(
    folder: Path, packs: Path, architecture: Architecture
) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Of each sample, run by itself: its place in the pack, its logits, and the losses of all its
    tokens but the last.
    """
    from megavlm.convert.hf.reference import load_reference
    from megavlm.data.loading.dataset import PackedDataset

    batch = PackedDataset(packs).batch(0, 0)
    reference = load_reference(folder)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    pixels = (batch.tiles / 255 - mean) / std
    ends = batch.sample_ends.tolist()
    found = []
    tile = 0
    for start, end in zip(ends[:-2], ends[1:-1], strict=True):
        tokens = batch.tokens[start:end]
        count = int((tokens == 7).sum()) // architecture.features_per_tile
        inputs = {"pixel_values": pixels[tile : tile + count]} if count else {}
        if architecture.prefix_lm:
            first = int(batch.loss_weights[start:end].nonzero()[0, 0]) + 1
            inputs["token_type_ids"] = (torch.arange(end - start) >= first).long()[None]
        with torch.no_grad():
            logits = reference(input_ids=tokens[None], **inputs).logits[0]
        found.append(
            (
                slice(start, end),
                logits,
                torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none"),
            )
        )
        tile += count
    assert tile == len(batch.tiles)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, name: str
) -> None:
    architecture = MODELS[name]
    vocabulary = architecture.language.vocab_size
    features = architecture.features_per_tile
    make_dataset(
        tmp_path / "packs",
        packs=1,
        vocab_size=vocabulary,
        context_token_id=7,
        tile_size=16,
        features_per_tile=features,
    )
    random_model(architecture, 7, tmp_path / "hf")
    folder = (
        make_chat(tmp_path / "hf", tmp_path / "chat", architecture)
        if name in CHAT
        else tmp_path / "hf"
    )
    expected = answers_of_transformers(tmp_path / "hf", tmp_path / "packs", architecture)
    for layout, (world, settings) in LAYOUTS.items():
        config = dataclasses.replace(
            config_for(tmp_path / "packs", head_tokens="all", **settings),
            architecture=architecture,
        )
        answers = [
            answer
            for answer in ranks.run(answers_of_pack, world, config, folder)
            if answer is not None
        ]
        logits = torch.from_numpy(np.concatenate([share for share, _ in answers], axis=-1))[
            :, :vocabulary
        ]
        for sample, their_logits, their_losses in expected:
            assert (logits[sample] - their_logits).abs().max() <= 1e-4, layout
            assert torch.equal(logits[sample].argmax(-1), their_logits.argmax(-1)), layout
            for _, losses in answers:
                assert losses[sample][:-1].sum() == pytest.approx(
                    float(their_losses.sum()), rel=1e-5
                ), layout
