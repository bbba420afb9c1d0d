"""The weights that a run starts with: the model is filled from what it starts from, and what its
files hold beside the model's own is kept for exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.lora import is_adapter
from megavlm.config.schema import Config
from megavlm.convert.hf import convert, from_parts, preprocessing, unused_weights
from megavlm.convert.hf.hub_formats import dialect_of, hub_format_of
from megavlm.convert.hf.preprocessing import Usage
from megavlm.model import weights
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train import checkpoint, start_point
from megavlm.train.resume import Start


def fill(
    config: Config, start: Start, base: Sequence[Start], chunks: Sequence[VisionLanguageModel]
) -> None:
    """Give this rank's chunks the weights that the run starts from. Collective.

    Args:
        config: the run.
        start: where they come from.
        base: what the base weights are filled from, if ``start`` is a checkpoint of trained
            parameters only; else empty.
        chunks: of this rank.
    """
    for base_start in base:
        fill(config, base_start, (), chunks)
    fresh = weights.fresh_tensor(config)
    if isinstance(start, Checkpoint):
        if config.architecture.lora.rank and not start.config.architecture.lora.rank:
            weights.fill(chunks, fresh, wanted=is_adapter)  # the rest is loaded
        checkpoint.load_weights(start, chunks)
    elif isinstance(start, Path):
        there = convert.full_tensors(start, config.architecture)
        weights.fill(chunks, lambda key, shape: (fresh if is_adapter(key) else there)(key, shape))
    else:
        if start is not None:
            # Base weights may be elsewhere than the command says.
            fresh = from_parts.full_tensors(replace(config, init=start), fresh)
        weights.fill(chunks, fresh)


def find_usage(start: Start) -> Usage | None:
    """Read how images become tiles for the model that a run starts from; none if that says nothing
    of it.
    """
    if isinstance(start, Checkpoint):
        return preprocessing.of_checkpoint(start.folder)
    return hub_format_of(start).read_usage(start) if isinstance(start, Path) else None


def find_unused(config: Config, start: Start) -> unused_weights.Weights:
    """Read what files of the trained model will hold of its vision encoder beside its weights."""
    if isinstance(start, Checkpoint):
        return unused_weights.read(start.folder)
    if isinstance(start, Path):
        found = convert.refuse_other(start, config.architecture)
        return unused_weights.of_model(start, found, dialect_of(start))
    if start is not None and start.vision and start_point.exports_unused(config):
        return unused_weights.of_encoder(Path(start.vision), config.architecture.vision)
    return {}
