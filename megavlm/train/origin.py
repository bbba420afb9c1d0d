"""What a run starts from, and how its weights are filled from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.checks.rules import ConfigError
from megavlm.config.exports import HOLDS
from megavlm.config.lora import is_adapter
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config, Init
from megavlm.convert.hf import convert, from_parts, unused_weights
from megavlm.convert.hf.hub_formats import dialect_of
from megavlm.convert.weights.tables import unused_rows
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.tokenizer import fingerprint
from megavlm.model import weights
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train import checkpoint, resume

Start = Checkpoint | Path | Init | None
"""What a run starts from: a checkpoint, a Hugging Face folder, parts, or nothing."""


def find(config: Config) -> Start:
    """Find what a run starts from that has no checkpoint of its own.

    Raises:
        ValueError: it is not there, or does not fit, or averages are to be measured and it has
            none.
    """
    start = _named(config)
    is_resumed = isinstance(start, Checkpoint) and resume.resumes(config, start)
    if config.eval.only and config.ema.evaluate and not is_resumed:
        raise ValueError(
            "--ema.evaluate true: with --eval.only true it needs a --checkpoint.load of the same"
            " recipe and --stage, without --checkpoint.weights_only, whose averages are measured;"
            " other weights come without averages"
        )
    return start


def _named(config: Config) -> Start:
    """Return what the command says that a run starts from; errors as of ``find``."""
    if config.init != Init():
        _check_parts(config)
        return config.init
    if not config.checkpoint.load:
        return None
    if (Path(config.checkpoint.load) / "config.json").is_file():
        convert.refuse_other(config.checkpoint.load, config.architecture)
        if config.checkpoint.moments == "keep":
            raise ValueError(
                f"--checkpoint.moments keep: {config.checkpoint.load} is of Hugging Face and has"
                " none; use fresh"
            )
        return Path(config.checkpoint.load)
    loaded = step_folder.find(config.checkpoint.load)
    if loaded is None:
        raise ValueError(
            f"--checkpoint.load {config.checkpoint.load}: no checkpoint and no Hugging Face model"
            " is there"
        )
    return resume.fit(config, loaded)


def _check_parts(config: Config) -> None:
    """Refuse parts that do not fit the model or the data."""
    from_parts.refuse_other(config.init, config.architecture)
    if config.init.vision and _exports_unused(config):
        unused_weights.check_encoder(Path(config.init.vision), config.architecture.vision)
    if config.init.language and resume.has_packs(config):
        tokenizer, _ = from_parts.extend_tokenizer(config.init, config.architecture.image_tokens)
        if (
            fingerprint(tokenizer)
            != read_manifest(config.data.train_folders[0]).tokenizer_fingerprint
        ):
            words = " ".join(from_parts.words_of(config.init))
            raise ConfigError(
                f"--data.train {config.data.train}: packed with another tokenizer than that of"
                f" {words}"
            )


def unused(config: Config, start: Start) -> unused_weights.Weights:
    """Read what files of the trained model will hold of its vision encoder beside its weights."""
    if isinstance(start, Checkpoint):
        return unused_weights.read(start.folder)
    if isinstance(start, Path):
        found = convert.refuse_other(start, config.architecture)
        return unused_weights.of_model(start, found, dialect_of(start))
    if start is not None and start.vision and _exports_unused(config):
        return unused_weights.of_encoder(Path(start.vision), config.architecture.vision)
    return {}


def _exports_unused(config: Config) -> bool:
    """Tell whether exports hold more of a vision encoder than the model uses."""
    dialect = recipe(config.recipe).format_for(config.architecture.objective)
    arch = config.architecture
    return not any(HOLDS[dialect](arch)) and bool(unused_rows(arch, dialect))


def fill(
    config: Config, start: Start, below: Sequence[Start], chunks: Sequence[VisionLanguageModel]
) -> None:
    """Give this rank's chunks the weights that the run starts from. Collective.

    Args:
        config: the run.
        start: where they come from.
        below: what lies below a checkpoint of trained parameters, if ``start`` is one.
        chunks: of this rank.
    """
    for base in below:
        fill(config, base, (), chunks)
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
            # Parts below a checkpoint may be elsewhere than the command says.
            fresh = from_parts.full_tensors(replace(config, init=start), fresh)
        weights.fill(chunks, fresh)
