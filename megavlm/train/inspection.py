"""Inspecting a whole job before it starts: whether it can run, and what it starts from. Nothing is
built or written.
"""

from __future__ import annotations

from pathlib import Path

from megavlm import job_checks
from megavlm.config import torchrun
from megavlm.config.checks.rules import check
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.weights.families import family_of
from megavlm.data.store.manifest import first_with_images, read_manifest
from megavlm.data.store.reader import Reader, check_shards
from megavlm.io.remote import is_remote
from megavlm.model import precision
from megavlm.train import base_weights, reference, resume, start_point
from megavlm.train.resume import Start
from megavlm.train.tasks import open_tasks


def inspect(config: Config, world_size: int) -> Start:
    """Check the whole job without building anything.

    Returns:
        What to start from: a checkpoint, a Hugging Face folder, parts, or nothing.

    Raises:
        ConfigError: everything that is wrong with the configuration, in one message.
        ValueError: a dataset or checkpoint that cannot be used.
    """
    inspect_job(config, world_size)
    return find_start(config)


def inspect_job(config: Config, world_size: int) -> None:
    """Check all of a job but what it starts from.

    Raises:
        ConfigError: everything that is wrong with the configuration, in one message.
        ValueError: a dataset that cannot be used.
    """
    check(
        config,
        world_size,
        facts=job_checks.dataset_facts(config),
        device=precision.device_capabilities(),
    )
    language = config.architecture.language
    if language.exists and not language.is_encoder:
        family_of(language)  # else the trained model could not be exported
    _check_tokenizer(config)
    if torchrun.local_rank() == 0:  # machines may have copies of their own
        for packs in _packs(config):
            Reader(packs, with_shards=False)  # looks at the index
        check_shards(_packs(config))
    if torchrun.rank() == 0:  # it reads the whole index, and all ranks hear of what it finds
        _check_lengths(config)
    open_tasks(config)


def find_start(config: Config) -> Start:
    """Find what a run starts from: its own checkpoint, or what the command names. Only small files
    are read, and nothing is written.

    Raises:
        ConfigError: it does not fit the run.
        ValueError: it is not there, or cannot be used; or a reference model's probabilities are not
            those that the run needs.
    """
    start = resume.find_own(config) or start_point.find_named(config)
    base_weights.check(config, start)
    if torchrun.rank() == 0 and resume.has_packs(config):
        reference.check(config, start)
    return start


def _packs(config: Config) -> list[str]:
    """Return the folders of all packs of a run."""
    return [*config.data.train_folders, *filter(None, [config.data.valid])]


def _check_tokenizer(config: Config) -> None:
    """Raise ValueError for packs without the tokenizer that an export needs, or with one that the
    format of the export cannot have.
    """
    if not config.checkpoint.export_hf:
        return
    folder = first_with_images(config.data.train_folders)  # whose tokenizer checkpoints hold
    if is_remote(folder):
        return
    row = HUB_FORMATS[recipe(config.recipe).format_for(config.architecture)]
    tokenizer = Path(folder) / "tokenizer"
    if not tokenizer.is_dir():
        raise ValueError(
            f"--checkpoint.export_hf {config.checkpoint.export_hf}: --data.train {folder} has no"
            " folder tokenizer, which the exported model needs; copy or pack the dataset again, or"
            " leave the option out"
        )
    if row.check_tokenizer:
        row.check_tokenizer(tokenizer)


def _check_lengths(config: Config) -> None:
    """Raise ValueError for packs of samples that are longer than the model reads."""
    bound = config.architecture.needs.longest_sample(config.architecture)
    if bound is None:
        return
    (option, most) = bound
    for packs in _packs(config):
        if read_manifest(packs).capacity <= most:  # no sample is longer than a pack
            continue
        longest = Reader(packs, with_shards=False).index.largest("longest")
        if longest > most:
            raise ValueError(
                f"{packs}: holds a sample of {longest} tokens, and {option} is {most}: each token"
                " needs a position"
            )
