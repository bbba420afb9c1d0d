"""What a run starts from: what the command names, and how it is told."""

from __future__ import annotations

from pathlib import Path

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.checks.rules import ConfigError
from megavlm.config.exports import HOLDS
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config, Init
from megavlm.convert.hf import convert, from_parts, named_tokens, unused_weights
from megavlm.convert.weights.tables import unused_rows
from megavlm.data.store.manifest import first_with_images, read_manifest
from megavlm.data.text.tokenizer import fingerprint
from megavlm.train import resume
from megavlm.train.resume import Start


def find_named(config: Config) -> Start:
    """Find what the command names for a run to start from that has no checkpoint of its own.

    Raises:
        ValueError: it is not there, or does not fit, or averages are to be measured and it has
            none.
    """
    start = _named(config)
    if config.eval.only and config.ema.evaluate and not resume.resumes(config, start):
        raise ValueError(
            "--ema.evaluate true: with --eval.only true it needs a --checkpoint.load of the same"
            " recipe and --stage, without --checkpoint.weights_only, whose averages are measured;"
            " other weights come without averages"
        )
    return start


def _named(config: Config) -> Start:
    """Return what the command says that a run starts from; errors as of ``find_named``."""
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
        _check_image_token(config)
        return Path(config.checkpoint.load)
    loaded = step_folder.find(config.checkpoint.load)
    if loaded is None:
        raise ValueError(
            f"--checkpoint.load {config.checkpoint.load}: no checkpoint and no Hugging Face model"
            f" is there{step_folder.runs_inside(config.checkpoint.load)}"
        )
    return resume.check_fits(config, loaded)


def _check_image_token(config: Config) -> None:
    """Refuse packs whose token for images is not the one of the folder that a run starts from: a
    tokenizer that lacks it gets it as a new row.
    """
    if not resume.has_packs(config):
        return
    named = named_tokens.image_token_id(Path(config.checkpoint.load))
    packs = first_with_images(config.data.train_folders)
    found = read_manifest(packs)
    if named is not None and found.totals.tiles and found.context_token_id != named:
        raise ConfigError(
            f"--data.train {packs}: its token for images is {found.context_token_id}, and that of"
            f" --checkpoint.load {config.checkpoint.load} is {named}, as its config.json says; pack"
            " with the tokenizer of that folder (--tokenizer)"
        )


def _check_parts(config: Config) -> None:
    """Refuse parts that do not fit the model or the data."""
    from_parts.refuse_other(config.init, config.architecture)
    if config.init.vision and exports_unused(config):
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


def exports_unused(config: Config) -> bool:
    """Tell whether exports hold more of a vision encoder than the model uses."""
    dialect = recipe(config.recipe).format_for(config.architecture)
    arch = config.architecture
    return not any(HOLDS[dialect](arch)) and bool(unused_rows(arch, dialect))


def describe_ahead(config: Config, start: Start) -> str:
    """Return in words what a run would start from, for ``--check``."""
    if isinstance(start, Checkpoint):
        if not resume.resumes(config, start):
            return f"it would start from the weights of {start.folder}"
        place = config.checkpoint.save if resume.is_own(config, start) else start.folder
        return f"it would resume {place} after step {start.state.step} of {config.training.steps}"
    if isinstance(start, Path):
        return f"it would start from the weights of {start}"
    if start is not None:
        return f"it would start from the weights of {', '.join(start.parts.values())}"
    return "it would start with random weights"


def describe(config: Config, start: Start, step: int) -> str:
    """Return in words what a run starts from.

    Args:
        config: the run.
        start: what it is.
        step: updates that are done.
    """
    if isinstance(start, Checkpoint):
        taken = f"resuming after step {step}" if resume.resumes(config, start) else "its weights"
        stage = start.state.stage
        made = f"stage {stage}, step {start.state.step}" if stage else "made by conversion"
        return f"{start.folder} ({made}): {taken}"
    if isinstance(start, Path):
        return f"{start} (Hugging Face): its weights"
    if start is None:
        return "fresh weights"
    parts = ", ".join(f"{part} from {folder}" for part, folder in start.parts.items())
    return f"{parts}, the rest fresh"
