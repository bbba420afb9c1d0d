"""Checks of a job that need no model, and so no torch: they take a moment, and run first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megavlm.config import unfreezing
from megavlm.config.checks import rules
from megavlm.config.checks.datasets import (
    DatasetFacts,
    batch_warnings,
    facts_problems,
)
from megavlm.config.checks.frozen_vision import frozen_vision_problems
from megavlm.config.checks.unread import OF_ONE_REPLICA, TOLERATED, preset_of, unread
from megavlm.config.lora import lora_problems
from megavlm.config.parameter_groups import name_problems, setting_problems
from megavlm.config.schema import Config
from megavlm.data.records.readers import is_annotation
from megavlm.data.store.manifest import read_manifest
from megavlm.data.store.reader import Reader
from megavlm.io.remote import is_remote
from megavlm.model_source import recipe_problems
from megavlm.planner.parameter_table import parameter_keys


def problems(config: Config, world_size: int) -> list[str]:
    """Return everything in a configuration, and in the packed datasets that it names, that cannot
    run on ``world_size`` ranks; each problem names the flag to change.
    """
    found = [*recipe_problems(config), *rules.problems(config, world_size)]
    found = with_parameter_problems(config, found)
    facts = []
    for flag, folder in _datasets(config):
        try:
            facts.append(_facts(flag, folder))
        except (ValueError, OSError) as error:
            found.append(f"{flag} {folder}: {error}")
    return [
        *found,
        *facts_problems(config, facts, world_size),
    ]


def warnings(config: Config, world_size: int) -> list[str]:
    """Return what runs on ``world_size`` ranks, but hardly as it is meant, and options that are not
    read.

    Raises:
        ValueError: a dataset that cannot be used.
        OSError: one that cannot be read.
    """
    of_steps = () if config.eval.only else batch_warnings(config, dataset_facts(config))
    is_one = world_size == config.parallel.model_parallel_size
    return [
        *of_steps,
        *_length_warnings(config),
        *unread(config, (*TOLERATED, *(OF_ONE_REPLICA if is_one else ()))),
    ]


def _length_warnings(config: Config) -> Iterator[str]:
    """Yield the datasets with samples that are longer than the language model was made for, if its
    positions are rotary, which have no end; the index is read if a pack may hold such a sample.
    """
    language = config.architecture.language
    most = language.max_position_embeddings
    if not language.exists or language.has_learned_positions:
        return
    flag = "--architecture.language"
    why = "the language model was made for shorter ones"
    if (factor := language.rotary_dynamic_factor) != 1:
        why = (
            f"transformers stretches the positions of longer ones by {flag}.rotary_dynamic_factor"
            f" {factor:g}, training does not, so for them an export is not exact"
        )
    for option, folder in _datasets(config):
        if read_manifest(folder).capacity <= most:  # no sample is longer than a pack
            continue
        longest = Reader(folder, with_shards=False).index.largest("longest")
        if longest > most:
            yield (
                f"{option} {folder}: holds a sample of {longest:,} tokens, and"
                f" {flag}.max_position_embeddings is {most}: {why}; give"
                f" {flag}.max_position_embeddings {longest}, which exports then state, or pack with"
                f" --capacity {most}"
            )


def with_parameter_problems(config: Config, found: Sequence[str]) -> list[str]:
    """Return problems that were found, with the ``parameter_problems`` of other options, unless the
    model cannot be: it has no names then.
    """
    if rules.model_problems(config):
        return list(found)
    return _with_others(found, parameter_problems(config))


def parameter_problems(config: Config) -> list[str]:
    """Return the patterns of names, and settings of parameter groups, that do not fit the model."""
    keys = parameter_keys(config)
    trainable = config.training.trainable
    of_adapters = list(lora_problems(config.architecture.lora, trainable, keys))
    of_frozen = list(unfreezing.setting_problems(config))
    found = [*setting_problems(config.optimizer), *of_frozen, *of_adapters]
    if not of_adapters:  # whose names may be missing
        usual = preset_of(config).optimizer
        found = _with_others(found, name_problems(config.optimizer, trainable, keys, usual))
        found += frozen_vision_problems(config, keys)
    if not of_frozen:
        found = _with_others(found, unfreezing.name_problems(config.training, keys))
    return found


def _with_others(found: Sequence[str], more: Iterable[str]) -> list[str]:
    """Return problems, with more of other options: a mistake is told once."""
    told = set(map(_option, found))
    return [*found, *(text for text in more if _option(text) not in told)]


def _option(problem: str) -> str:
    """Return the flag and the value that a problem begins with."""
    return " ".join(problem.split()[:2]).rstrip(":")


def dataset_facts(config: Config) -> list[DatasetFacts]:
    """Return what the manifests of the datasets say.

    Raises:
        ValueError: a dataset that cannot be used.
    """
    return [_facts(flag, folder) for flag, folder in _datasets(config)]


def _datasets(config: Config) -> list[tuple[str, str]]:
    """Return the flag and the folder of each dataset that is there."""
    named = [
        *(("--data.train", folder) for folder in config.data.train_folders),
        ("--data.valid", config.data.valid),
    ]
    return [
        (flag, folder)
        for flag, folder in named
        if folder and not is_annotation(folder) and (is_remote(folder) or Path(folder).is_dir())
    ]


def _facts(flag: str, folder: str) -> DatasetFacts:
    manifest = read_manifest(folder)
    return DatasetFacts(
        flag=flag,
        folder=folder,
        image_size=manifest.image_size,
        features_per_tile=manifest.features_per_tile,
        vocab_size=manifest.vocab_size,
        capacity=manifest.capacity,
        alignment=manifest.alignment,
        num_packs=manifest.totals.packs,
        num_samples=manifest.totals.samples,
        has_images=manifest.totals.tiles > 0,
        fingerprint=manifest.tokenizer_fingerprint,
        pixel_mean=manifest.pixel_mean,
        pixel_std=manifest.pixel_std,
        resample=manifest.resample,
        may_augment=any(source.augment for source in manifest.sources),
        has_levels=bool(manifest.levels),
        template=manifest.template,
        tiling=manifest.tiling,
        instruction_length=manifest.instruction_length,
        qformer_vocab_size=manifest.qformer_vocab_size,
        qformer_fingerprint=manifest.qformer_fingerprint,
        preferences=manifest.preferences,
    )
