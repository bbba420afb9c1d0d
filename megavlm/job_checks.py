"""Checks of a job that need no model, and so no torch: they take a moment, and run first."""

from __future__ import annotations

from pathlib import Path

from megavlm.config import unfreezing
from megavlm.config.checks import rules
from megavlm.config.checks.datasets import DatasetFacts, batch_warnings, facts_problems
from megavlm.config.checks.unread import TOLERATED, preset_of, unread
from megavlm.config.lora import lora_problems
from megavlm.config.parameter_groups import name_problems, setting_problems
from megavlm.config.schema import Config
from megavlm.data.records.readers import is_annotation
from megavlm.data.store.manifest import read_manifest
from megavlm.io.remote import is_remote
from megavlm.planner.parameter_table import parameter_keys


def problems(config: Config, world_size: int) -> list[str]:
    """Return everything in a configuration, and in the packed datasets that it names, that cannot
    run on ``world_size`` ranks; each problem names the flag to change.
    """
    found = rules.problems(config, world_size)
    found = found or parameter_problems(config)
    facts = []
    for flag, folder in _datasets(config):
        try:
            facts.append(_facts(flag, folder))
        except (ValueError, OSError) as error:
            found.append(f"{flag} {folder}: {error}")
    return found + facts_problems(config, facts)


def warnings(config: Config) -> list[str]:
    """Return what runs, but hardly as it is meant, and options that are not read.

    Raises:
        ValueError: a dataset that cannot be used.
    """
    of_steps = () if config.eval.only else batch_warnings(config, dataset_facts(config))
    return [*of_steps, *unread(config, TOLERATED)]


def parameter_problems(config: Config) -> list[str]:
    """Return the patterns of names, and settings of parameter groups, that do not fit the model."""
    wrong = [*setting_problems(config.optimizer), *unfreezing.setting_problems(config)]
    keys = parameter_keys(config)
    trainable = config.training.trainable
    wrong += lora_problems(config.architecture.lora, trainable, keys)
    if wrong:
        return wrong
    wrong += name_problems(config.optimizer, trainable, keys, preset_of(config).optimizer)
    return wrong or list(unfreezing.name_problems(config.training, keys))


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
    )
