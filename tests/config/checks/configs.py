"""Configurations and facts of datasets for the tests of the cross checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavlm.config.checks.rules import DatasetFacts
from megavlm.config.cli import parse
from megavlm.config.schema import Config


def tiny(packs: Path, *arguments: str, stage: str = "2", model: str = "tiny") -> Config:
    saved = ["--data.train", str(packs), "--checkpoint.save", str(packs.parent / "run")]
    return parse(["--stage", stage, "--model", model, *saved, *arguments])


def facts(config: Config, **changes: Any) -> DatasetFacts:
    good = DatasetFacts(
        flag="--data.train",
        folder="packs",
        image_size=config.architecture.vision.image_size,
        features_per_tile=config.architecture.features_per_tile,
        vocab_size=config.architecture.language.vocab_size,
        capacity=1024,
        alignment=1,
        num_packs=10,
        has_images=True,
        fingerprint="abc",
        pixel_mean=config.architecture.vision.pixel_mean,
        pixel_std=config.architecture.vision.pixel_std,
        resample=config.architecture.vision.resample,
        template=config.data.template[0],
    )
    return dataclasses.replace(good, **changes)
