"""Checks of drop path and its schedule."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.freeze_mask import trains
from megavlm.config.schema import Training


def drop_path_problems(training: Training) -> Iterator[str]:
    """Name the settings of drop path that cannot be used, or would have no effect."""
    for name in ("drop_path", "end_drop_path"):
        rate = vars(training)[name]
        if not 0 <= rate < 1:
            yield f"--training.{name} {rate}: must be 0 or more, and less than 1"
        elif rate and training.trainable and not trains("vision", training.trainable):
            yield (
                f"--training.{name} {rate} has no effect: --training.trainable"
                f" {','.join(training.trainable)} leaves the vision encoder frozen; use 0"
            )
