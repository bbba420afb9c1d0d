"""Does an exported model compute what the trained one does? Logits of both, on the same samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavlm.config.schema import Parallel
from megavlm.convert.hf.reference import load_reference
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.dataset import PackedDataset
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import make_layout
from megavlm.train import checkpoint


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near two models are.

    Args:
        samples: samples compared.
        tokens: positions compared.
        max_abs_difference: largest difference between two logits.
        equal_choices: positions at which both rank the same token first.
    """

    samples: int
    tokens: int
    max_abs_difference: float
    equal_choices: int


@torch.no_grad()
def compare(checkpoint_path: str, hf_folder: Path, dataset_folder: Path, packs: int) -> Agreement:
    """Compare the checkpoint, which reads whole packs, with ``transformers``, which reads their
    samples one by one.

    Args:
        checkpoint_path: folder of a step, or of a run.
        hf_folder: the exported model.
        dataset_folder: packs to compare on.
        packs: how many of them, from the first.

    Raises:
        ValueError: there is no checkpoint, or it does not fit.
    """
    machine = backend.start(timeout_minutes=30)
    model = _load(checkpoint_path, machine)
    dataset = PackedDataset(dataset_folder)
    other = load_reference(hf_folder).to(machine.device)
    samples = tokens = equal = 0
    largest = 0.0
    for pack_id in range(min(packs, len(dataset))):
        batch = dataset.batch(
            pack_id, pack_id, vision_layers=model.architecture.vision.num_layers
        ).to(machine.device)
        ours = model(batch, with_loss=False)[:, : model.architecture.language.vocab_size].float()
        pixels = model.vision.normalise(batch.tiles)
        for start, end, first, last in _samples(batch, model.architecture.features_per_tile):
            inputs = {"pixel_values": pixels[first:last]} if last > first else {}
            theirs = other(input_ids=batch.tokens[None, start:end], **inputs).logits[0].float()
            mine = ours[start:end]
            largest = max(largest, float((mine - theirs).abs().max()))
            equal += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            samples = samples + 1
            tokens = tokens + end - start
    process_groups.destroy()
    return Agreement(
        samples=samples, tokens=tokens, max_abs_difference=largest, equal_choices=equal
    )


def _load(path: str, machine: backend.Backend) -> VisionLanguageModel:
    found = checkpoint.find(path)
    if found is None:
        raise ValueError(f"--load {path}: no checkpoint is there")
    alone = dataclasses.replace(found.config, parallel=Parallel())
    place = process_groups.create(alone.parallel, seed=0)
    model = VisionLanguageModel(alone, make_layout(alone), place).to(machine.device)
    checkpoint.load_weights(found, [model])
    return model.eval()


def _samples(batch: Batch, features_per_tile: int) -> list[tuple[int, int, int, int]]:
    """Tokens and tiles of each sample: first and last token, first and last tile; without the
    padding at the end.
    """
    ends = batch.sample_ends.tolist()
    tiles = 0
    found = []
    positions: Tensor = batch.feature_positions
    for start, end in zip(ends, ends[1:], strict=False):
        own = int(((positions >= start) & (positions < end)).sum()) // features_per_tile
        if bool(batch.loss_weights[start:end].any()) or own:
            found.append((start, end, tiles, tiles + own))
        tiles += own
    return found
