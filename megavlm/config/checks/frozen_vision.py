"""Cross checks of a vision encoder that a run leaves frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from megavlm.config.freeze_mask import matches_any
from megavlm.config.schema import Config


def frozen_vision_problems(config: Config, keys: Collection[str]) -> Iterator[str]:
    """Name the settings that only a vision encoder that is trained could follow.

    Args:
        config: the run.
        keys: checkpoint keys of all parameters. A pattern such as ``*.lora`` may mean some of the
            vision encoder or none.
    """
    training = config.training
    trained = {key for key in keys if matches_any(key, training.trainable)}
    if not trained or any(key.startswith("vision.") for key in trained):
        return
    frozen = f"--training.trainable {','.join(training.trainable)} leaves the vision encoder frozen"
    for name in ("drop_path", "end_drop_path"):
        if rate := vars(training)[name]:
            yield f"--training.{name} {rate} has no effect: {frozen}; use 0"
    if config.fp8.vision == "delayed":
        yield (
            f"--fp8.vision delayed: {frozen}, and without a backward pass its scales are never set;"
            " use tensorwise"
        )
