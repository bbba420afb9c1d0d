"""Compare the logits of an exported model with those of the checkpoint that it came from.

The checkpoint's model reads whole packs; ``transformers`` reads their samples one by one. Both
compute in the same dtype, and the checkpoint's weights are first rounded to the dtype of the
exported ones, adapters merged, so that only the order of the sums may differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import SHARDS, Checkpoint
from megavlm.config.lora import Lora
from megavlm.config.schema import Architecture, Fp8, Parallel
from megavlm.convert.dist_checkpoint import ShardsFolder
from megavlm.convert.hf import convert
from megavlm.convert.hf.reference import (
    instruction_inputs,
    load_reference,
    refuse_other_tiles,
    shown_pixels,
    tile_inputs,
)
from megavlm.convert.hf.reference_videos import with_videos
from megavlm.convert.weights.views import Tensors
from megavlm.data.images.feature_layout import Tiled, as_tiled
from megavlm.data.loading.batch import Batch, options_of
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.manifest import Manifest
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from megavlm.model import weights
from megavlm.model.expert_adapters import GroupedAdapters
from megavlm.model.lora import LowRankAdapter
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import make_layout
from megavlm.train import checkpoint
from tools.verification.agreement import Agreement
from tools.verification.routing import Choices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Tally:
    """Sums over the positions compared so far."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.largest = 0.0
        self.largest_logit = 0.0
        self.equal = 0
        self.not_finite = 0
        self.choices = 0
        self.other_choices = 0
        self.largest_shortfall = 0.0

    def add_choices(self, found: Choices) -> None:
        """Count the choices of experts of one pack."""
        self.choices += found.made
        self.other_choices += found.other
        self.largest_shortfall = max(self.largest_shortfall, found.shortfall)

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Count one sample; ``ours`` and ``theirs`` are its logits, [tokens, vocabulary]."""
        finite = ours.isfinite().all(-1) & theirs.isfinite().all(-1)
        self.samples += 1
        self.tokens += len(ours)
        self.not_finite += int((~finite).sum())
        ours = ours[finite]
        theirs = theirs[finite]
        if not len(ours):
            return
        self.largest = max(self.largest, float((ours - theirs).abs().max()))
        self.largest_logit = max(self.largest_logit, float(ours.abs().max()))
        self.equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


@torch.no_grad()
def compare(
    checkpoint_path: str,
    hf_folder: Path,
    dataset_folder: Path,
    packs: int,
    dtype: str = "float32",
    *,
    averages: bool = False,
) -> Agreement:
    """Compare the checkpoint with ``transformers``.

    Args:
        checkpoint_path: folder of a step, or of a run.
        hf_folder: the exported model.
        dataset_folder: packs to compare on.
        packs: how many of them, spread over all; at least 1.
        dtype: both models compute in, a key of ``DTYPES``.
        averages: the export has the moving averages of the parameters.

    Raises:
        FileNotFoundError: a folder or the checkpoint is missing.
        ValueError: checkpoint, model and packs do not belong together.
    """
    if packs < 1:
        raise ValueError(f"--packs {packs}: must be at least 1")
    found = step_folder.find_given(checkpoint_path)
    dataset = PackedDataset(dataset_folder)
    _refuse_others(found, hf_folder, dataset.manifest)
    device = backend.start(timeout_minutes=30).device
    try:
        theirs = load_reference(hf_folder, DTYPES[dtype]).to(device)
        ours = _load(found, hf_folder, dtype, device, averages=averages)
        tally = _Tally()
        for pack_id in spread(len(dataset), packs):
            _compare_pack(dataset, pack_id, ours, theirs, tally)
    finally:
        process_groups.destroy()
    return Agreement(
        samples=tally.samples,
        tokens=tally.tokens,
        max_abs_difference=tally.largest,
        largest_logit=tally.largest_logit,
        equal_choices=tally.equal,
        not_finite=tally.not_finite,
        dtype=dtype,
        checkpoint=str(found.folder),
        choices=tally.choices,
        other_choices=tally.other_choices,
        largest_shortfall=tally.largest_shortfall,
    )


def spread(count: int, wanted: int) -> list[int]:
    """Return the numbers of so many of ``count`` packs, evenly spread. Packs are stored by cost, so
    the first ones of a mixture have no images.
    """
    taken = min(count, wanted)
    return [(2 * number + 1) * count // (2 * taken) for number in range(taken)]


def _compare_pack(
    dataset: PackedDataset,
    pack_id: int,
    ours: VisionLanguageModel,
    theirs: nn.Module,
    tally: _Tally,
) -> None:
    """Add the samples of one pack to ``tally``."""
    architecture = ours.architecture
    batch = dataset.batch(pack_id, pack_id, options_of(architecture))
    batch = batch.to(next(theirs.parameters()).device)
    tiles = batch.tiles
    if architecture.vision.spans_tiles:  # they stand window by window
        tiles = shown_pixels(dataset, pack_id).to(tiles.device)
    images = dataset.reader.read(pack_id, with_images=False).images
    owners = _owners(dataset.manifest, batch.samples)
    samples = _samples(batch, images, owners)
    pixels = ours.vision.normalise(tiles)

    def answer(sample: int) -> Tensor:
        own = as_tiled(images[images["sample"] == owners[sample]])
        inputs = _inputs(architecture, theirs, batch, pixels, own, samples[sample])
        return theirs(**with_videos(theirs, inputs, own, dataset.layout)).logits[0].float()

    # With experts each sample is computed twice: the logits of a pack are too large to keep two.
    choices = Choices(len(batch.tokens))
    with contextlib.ExitStack() as stack:
        if architecture.language.num_experts:
            for sample, (start, *_) in enumerate(samples):
                with choices.recorded(theirs, start):
                    answer(sample)
            stack.enter_context(choices.replayed(ours))
        whole = ours(batch, with_loss=False)[:, : architecture.language.vocab_size].float()
    tally.add_choices(choices)
    for sample, (start, end, *_) in enumerate(samples):
        tally.add(whole[start:end], answer(sample))


def _inputs(
    architecture: Architecture,
    theirs: nn.Module,
    batch: Batch,
    pixels: Tensor,
    images: Sequence[Tiled],
    sample: tuple[int, int, int, int],
) -> dict[str, Tensor]:
    """Return what ``transformers`` reads of a sample, frames of videos as images.

    Args:
        architecture: of both models.
        theirs: that of ``transformers``.
        batch: the pack.
        pixels: of its tiles, normalised, those of an image row by row.
        images: of the sample.
        sample: first token, end, first tile, end.
    """
    start, end, first, last = sample
    tokens = batch.tokens[start:end]
    inputs = tile_inputs(theirs, pixels[first:last], images, tokens)
    inputs |= instruction_inputs(batch.instructions, slice(first, last))
    if architecture.cross_attention.every:
        inputs = _read_images(batch, pixels, sample)
    if architecture.prefix_lm:
        prefixes = dict(zip(batch.sample_ends.tolist(), batch.prefixes.lengths, strict=False))
        places = torch.arange(end - start, device=batch.tokens.device)
        inputs["token_type_ids"] = (places >= prefixes[start]).long()[None]
    return inputs | {"input_ids": tokens[None]}


def _read_images(
    batch: Batch, pixels: Tensor, sample: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """Return the images of a sample, and which of its tokens reads which, as
    ``IdeficsForVisionText2Text`` takes them: a sample without images has one that none reads.

    Args:
        batch: the pack.
        pixels: of all tiles.
        sample: first token, end, first tile, end.
    """
    start, end, first, last = sample
    tiles = batch.media.images.repeat_interleave(batch.media.ends.diff())
    rows = batch.media.rows
    own = (rows >= start) & (rows < end) & (last > first)
    shown = range(first, max(last, first + 1)) if first < len(pixels) else range(1)
    mask = batch.tokens.new_zeros((end - start, len(shown)))
    mask[rows[own] - start, tiles[own] - first] = 1
    return {
        "pixel_values": pixels[None, shown.start : shown.stop],
        "image_attention_mask": mask[None],
    }


def _refuse_others(found: Checkpoint, hf_folder: Path, packs: Manifest) -> None:
    """Raise ValueError if checkpoint, exported model and packs do not belong together."""
    architecture = found.config.architecture
    if not architecture.needs.has_vocabulary_head:
        raise ValueError(
            f"--load {found.folder}: a model of pairs has no logits of tokens to compare; compare"
            " its figures on a task of pairs, see tools/evaluate.py"
        )
    convert.refuse_other(hf_folder, architecture)
    exported = fingerprint(load_tokenizer(hf_folder, "--hf"))
    if packs.tokenizer_fingerprint != exported:
        raise ValueError(
            f"--data: packs of another tokenizer ({packs.tokenizer_fingerprint}) than that of --hf"
            f" {hf_folder} ({exported}); name packs that the model was trained on"
        )
    if found.state.tokenizer not in (None, exported):
        raise ValueError(
            f"--hf {hf_folder}: has another tokenizer ({exported}) than the checkpoint"
            f" ({found.state.tokenizer})"
        )
    refuse_other_tiles("--data", packs, hf_folder)


def _load(
    found: Checkpoint, hf_folder: Path, dtype: str, device: torch.device, *, averages: bool
) -> VisionLanguageModel:
    """Return the checkpoint's model, its weights rounded to the dtype of the exported ones."""
    training = dataclasses.replace(found.config.training, precision=dtype)
    alone = dataclasses.replace(found.config, parallel=Parallel(), fp8=Fp8(), training=training)
    groups = process_groups.create(alone.parallel, seed=0)
    model = VisionLanguageModel(alone, make_layout(alone), groups).to(device)
    checkpoint.load_weights(found, [model])
    source = ShardsFolder(found.folder / SHARDS, averages=averages)
    if averages:
        weights.fill([model], lambda key, shape: source[key])
    model.eval()
    _round(model, source, _exported_dtypes(hf_folder, found.config.architecture))
    return model


def _exported_dtypes(hf_folder: Path, architecture: Architecture) -> dict[str, torch.dtype]:
    """Return the dtype of each weight of the exported model, by our key."""
    merged = dataclasses.replace(architecture, lora=Lora())
    headers = convert.hf_tensors_as_megatron(hf_folder, merged).headers
    return {key: header.dtype for key, header in headers.items()}


def _round(model: VisionLanguageModel, source: Tensors, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round weights as an export rounds them, which has added adapters to them before. In float32
    there is nothing to round, and adapters stay beside their weights.
    """
    adapts = model.architecture.lora.adapts
    rounded = {
        key
        for key, dtype in dtypes.items()
        if key in source.headers and source.headers[key].dtype != dtype and not adapts(key)
    }
    weights.fill([model], lambda key, shape: source[key].to(dtypes[key]), rounded.__contains__)
    of_adapted = [dtype for key, dtype in dtypes.items() if adapts(key)]
    if not of_adapted or torch.float32 in of_adapted:
        return
    adapted = [pair for module in model.modules() for pair in _adapters(module)]
    for adapter, weight in adapted:
        changed = adapter(_identity(adapter.a), weight.T).T
        if adapter.magnitude is not None:
            changed *= (adapter.magnitude / adapter.norms(weight))[:, None]
        weight.copy_(changed.to(of_adapted[0]))
        adapter.b.zero_()
        if adapter.magnitude is not None:  # so that it changes nothing any more
            adapter.magnitude.copy_(adapter.norms(weight))


def _identity(like: Tensor) -> Tensor:
    """Return the identity of what an A [rank, inputs] reads [inputs, inputs]."""
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def _adapters(module: nn.Module) -> Iterator[tuple[LowRankAdapter, Tensor]]:
    """Yield the adapters of a linear layer, or of a grouped one, each with its weight."""
    lora = dict(module.named_children()).get("lora")
    if isinstance(lora, LowRankAdapter):
        yield lora, module.get_parameter("weight")
    elif isinstance(lora, GroupedAdapters):
        for number, adapter in lora.items():
            yield adapter, module.get_parameter(f"weight{number}")


def _owners(manifest: Manifest, samples: int) -> np.ndarray:
    """Return whose images each sample of a pack shows: its own, or of a pair of preferences those
    of the chosen answer, int64 [samples].
    """
    each = np.arange(samples)
    return each - each % 2 if manifest.preferences else each


def _samples(
    batch: Batch, images: np.ndarray, owners: np.ndarray
) -> list[tuple[int, int, int, int]]:
    """Return first token and end, first tile and end of each sample, without the padding behind
    it, whose logits are nobody's: routers send it to no expert. ``images`` is the pack's table of
    images, and ``owners`` says whose each sample shows.
    """
    starts = batch.sample_ends.tolist()
    real = np.concatenate([[0], (~batch.is_padding).cpu().numpy().cumsum()])
    ends = [start + int(real[end] - real[start]) for start, end in pairwise(starts)]
    tiles = np.bincount(images["sample"], weights=images["tiles"], minlength=batch.samples)
    last = np.cumsum(tiles, dtype=np.int64)
    first = last - tiles.astype(np.int64)
    places = first[owners].tolist(), last[owners].tolist()
    return list(zip(starts[: batch.samples], ends, *places, strict=False))
