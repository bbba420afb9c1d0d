"""What every recipe's model is held to: transformers, and packs against their samples alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavlm.config.schema import Architecture, Config
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.batch import options_of
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_sources
from megavlm.data.sample import Sample
from tests.data.samples import write_packs
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for
from tests.ranks.test_packs import losses_and_gradients

CONTEXT = 7
END = 2
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}
"""Ranks and settings of the layouts that logits are compared at."""


def sizes_of(architecture: Architecture) -> dict[str, int]:
    """Return what random samples have to know of a model."""
    return dict(
        vocab_size=architecture.language.vocab_size,
        context_token_id=CONTEXT,
        tile_size=architecture.vision.image_size,
        features_per_tile=architecture.placeholders_per_tile,
    )


def pack_records(
    records: Path,
    words: Path | str,
    out: Path,
    architecture: Architecture,
    *,
    template: str,
    **tiling: Any,
) -> None:
    """Pack records, beside whose file their media lie, for a model of one of LLaVA's recipes."""
    vision = architecture.vision
    pack_dataset(
        Job(
            sources=read_sources(None, str(records), str(records.parent)),
            tokenizer=str(words),
            out=str(out),
            capacity=512,
            features_per_tile=architecture.features_per_tile,
            tiling=Tiling(tile_size=vision.image_size, pixel_mean=vision.pixel_mean, **tiling),
            pixel_std=vision.pixel_std,
            template=template,
        )
    )


def recipe_config(recipe: str, architecture: Architecture, packs: Path, **settings: Any) -> Config:
    """Return a run of a recipe's model, on two packs a step unless interleaved stages may need
    four; ``settings`` as in ``config_for``.
    """
    usual = dict(global_batch_size=4 if asks_for_all() else 2)
    config = config_for(packs, **usual | settings)
    return dataclasses.replace(config, architecture=architecture, recipe=recipe)


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
    batch = PackedDataset(config.data.train).batch(0, 0, options_of(config.architecture))
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
    from megavlm.convert.hf.reference import (
        instruction_inputs,
        load_reference,
        shown_pixels,
        tile_inputs,
    )
    from megavlm.convert.hf.reference_videos import with_videos
    from megavlm.data.images.feature_layout import as_tiled
    from megavlm.data.loading.dataset import PackedDataset

    dataset = PackedDataset(packs)
    batch = dataset.batch(0, 0)
    images = dataset.reader.read(0).images
    reference = load_reference(folder)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    pixels = (shown_pixels(dataset, 0) / 255 - mean) / std
    ends = batch.sample_ends.tolist()
    found = []
    tile = 0
    for sample, (start, end) in enumerate(zip(ends[:-2], ends[1:-1], strict=True)):
        tokens = batch.tokens[start:end]
        own = images[images["sample"] == sample]
        count = int(own["tiles"].sum())
        shown = pixels[tile : tile + count]
        if not architecture.vision.exists:  # the class takes patches, not images
            shown = shown.permute(0, 2, 3, 1).flatten(1)[None]
        if not count:
            shown = shown[:0]
        inputs = tile_inputs(reference, shown, as_tiled(own), tokens)
        inputs |= instruction_inputs(batch.instructions, slice(tile, tile + count))
        if architecture.cross_attention.every:
            inputs = _read_by_idefics(tokens, shown if count else pixels[:1], count)
        if architecture.prefix_lm:
            first = int(batch.loss_weights[start:end].nonzero()[0, 0]) + 1
            inputs["token_type_ids"] = (torch.arange(end - start) >= first).long()[None]
        inputs["input_ids"] = tokens[None]
        with torch.no_grad():
            inputs = with_videos(reference, inputs, as_tiled(own), dataset.layout)
            logits = reference(**inputs).logits[0]
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


def _read_by_idefics(tokens: torch.Tensor, pixels: torch.Tensor, images: int) -> dict[str, Any]:
    """Return what ``IdeficsForVisionText2Text`` reads beside the tokens of one sample, with the
    mask that its processor makes. Without an image it still wants pixels, which nothing reads.
    """
    from transformers.models.idefics import processing_idefics

    class Words:
        eos_token_id = END

        def convert_tokens_to_ids(self, token: str) -> int:
            return CONTEXT

    read, _ = processing_idefics.image_attention_mask_for_packed_input_ids_pt(
        tokens[None].clone(), Words()
    )
    count = max(images, 1)
    mask = processing_idefics.incremental_to_binary_attention_mask(read, "pt", num_classes=count)
    return {"pixel_values": pixels[None], "image_attention_mask": mask}


def assert_equals_transformers(
    ranks: Pool,
    configure: Callable[..., Config],
    folder: Path,
    expected: Sequence[tuple[slice, torch.Tensor, torch.Tensor]],
    worlds: Mapping[str, tuple[int, dict[str, Any]]] = WORLDS,
) -> None:
    """Compare the first pack's logits (1e-4) and losses (1e-5) with those of transformers.

    Args:
        ranks: run the model.
        configure: makes the run of settings.
        folder: with the weights.
        expected: what ``answers_of_transformers`` gives.
        worlds: layouts.
    """
    for name, (world, settings) in worlds.items():
        config = configure(head_tokens="all", **settings)
        found = ranks.run(answers_of_pack, world, config, folder)
        answers = [one for one in found if one is not None]
        logits = torch.from_numpy(np.concatenate([share for share, _ in answers], axis=-1))
        logits = logits[:, : config.architecture.language.vocab_size]
        for sample, their_logits, their_losses in expected:
            assert (logits[sample] - their_logits).abs().max() <= 1e-4, name
            assert torch.equal(logits[sample].argmax(-1), their_logits.argmax(-1)), name
            theirs = float(their_losses.sum())
            for _, losses in answers:
                assert losses[sample][:-1].sum() == pytest.approx(theirs, rel=1e-5), name


def assert_pack_equals_samples_alone(
    ranks: Pool,
    configure: Callable[[Path], Config],
    samples: Sequence[Sample],
    folder: Path,
    write: Callable[..., object] = write_packs,
    **settings: int,
) -> None:
    """Compare losses and gradients of samples in one pack with those of each in a pack alone.

    Args:
        ranks: run the model.
        configure: makes the run of a folder of packs.
        samples: to pack.
        folder: for the packs.
        write: writes packs.
        settings: of ``write_packs``.
    """
    write(folder / "together", [list(samples)], **settings)
    write(folder / "alone", [[sample] for sample in samples], **settings)
    [(together, gradients)] = ranks.run(losses_and_gradients, 1, configure(folder / "together"))
    [(alone, expected)] = ranks.run(losses_and_gradients, 1, configure(folder / "alone"))
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        limit = 1e-5 * np.abs(expected[key]).max() + 1e-7
        np.testing.assert_allclose(gradient, expected[key], atol=limit, err_msg=key)
