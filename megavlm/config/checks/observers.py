"""Cross checks of what a run is observed with."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Checkpoint, Logging


def observer_problems(logging: Logging, checkpoint: Checkpoint) -> Iterator[str]:
    """Name trackers that cannot be used."""
    if logging.tensorboard and not checkpoint.save:
        yield "--logging.tensorboard true needs --checkpoint.save, where its files go"
    if logging.wandb_project and logging.wandb_mode == "offline" and not checkpoint.save:
        yield "--logging.wandb_mode offline needs --checkpoint.save, where its files go"
