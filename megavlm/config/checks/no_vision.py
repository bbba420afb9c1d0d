"""Cross checks of a model without a vision encoder, whose connector reads pixels."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from megavlm.config.differences import changed
from megavlm.config.schema import NO_VISION, PATCH_SETTINGS, Architecture, Config

_NONE = "there is no vision encoder (--architecture.vision.num_layers 0)"


def model_problems(arch: Architecture) -> Iterator[str]:
    """Yield what a model without a vision encoder cannot be made of."""
    if arch.vision.exists:
        return
    if arch.connector.kind != "linear":
        yield (
            f"--architecture.connector.kind {arch.connector.kind}: {_NONE}, and only linear reads"
            " pixels; use it"
        )
    usual = vars(NO_VISION)
    for name, value in changed(arch.vision, usual=NO_VISION).items():
        if name not in PATCH_SETTINGS:
            yield (
                f"--architecture.vision.{name} {value}: {_NONE}; leave it out, or use {usual[name]}"
            )


def run_problems(config: Config) -> Iterator[str]:
    """Yield settings of a run that only a vision encoder could follow."""
    if config.architecture.vision.exists:
        return
    for pattern in config.training.trainable:
        part = pattern.split(".")[0]
        if fnmatchcase("vision", part) and not fnmatchcase("language", part):
            yield f"--training.trainable {pattern}: {_NONE}; leave it out"
    if config.init.vision:
        yield f"--init.vision {config.init.vision}: {_NONE}; leave it out"
    if config.fp8.vision != "none":
        yield f"--fp8.vision {config.fp8.vision}: {_NONE}; use none"
    decay = config.optimizer.vision_layer_decay
    if decay != 1:
        yield f"--optimizer.vision_layer_decay {decay}: {_NONE}; use 1"
