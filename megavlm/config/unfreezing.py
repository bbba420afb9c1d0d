"""Parameters of ``training.trainable`` that stay frozen for the first steps of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from megavlm.config.freeze_mask import matches, matches_any
from megavlm.config.schema import Config, Training


def _entries(training: Training) -> Iterator[tuple[str, int]]:
    for entry in training.frozen_until:
        pattern, _, step = entry.partition("=")
        yield pattern.strip(), int(step)


def frozen_steps(key: str, training: Training) -> int:
    """Return for how many steps a trained parameter stays frozen; of several entries that name it
    the last counts.
    """
    found = [steps for pattern, steps in _entries(training) if matches(key, pattern)]
    return found[-1] if found else 0


def setting_problems(config: Config) -> Iterator[str]:
    """Name the entries that no model could have."""
    training = config.training
    for entry in training.frozen_until:
        pattern, equals, step = entry.partition("=")
        flag = f"--training.frozen_until {entry}"
        if not pattern.strip() or not equals or not step.strip().isdecimal():
            yield f"{flag}: must be a part or a pattern of names, =, and steps: vision=1000"
        elif not 0 < int(step) < training.steps:
            yield (
                f"{flag}: must be from 1 to {training.steps - 1}, since the run has"
                f" {training.steps} steps; what is never trained is left out of"
                " --training.trainable"
            )
    if training.frozen_until and config.checkpoint.moments == "keep":
        yield (
            "--training.frozen_until and --checkpoint.moments keep exclude each other: moments of"
            " what is unfrozen start fresh; use fresh"
        )


def name_problems(training: Training, keys: Collection[str]) -> Iterator[str]:
    """Name entries that mean no trained parameter of a model, and masks that leave none at first.

    Args:
        training: the settings.
        keys: checkpoint keys of all parameters.
    """
    if not training.frozen_until:
        return
    trained = {key for key in keys if matches_any(key, training.trainable)}
    for entry in training.frozen_until:
        pattern = entry.partition("=")[0].strip()
        if not any(matches(key, pattern) for key in trained):
            yield (
                f"--training.frozen_until {entry}: names nothing that --training.trainable trains;"
                " what is unfrozen must be in that mask"
            )
    steps = [frozen_steps(key, training) for key in trained]
    if steps and all(steps):
        yield f"--training.frozen_until: nothing would be trained in the first {min(steps)} steps"
