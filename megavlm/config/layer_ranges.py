"""Ranges of layers in a configuration, such as ``vision.layers.-4:``, as the names they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megavlm.config.freeze_mask import expand
from megavlm.config.schema import Config


def with_layers(config: Config) -> Config:
    """Write out every range of layers, so that nothing but names and patterns of names is left.

    Raises:
        ValueError: a range holds no layer; the message names its flag.
    """

    def written_out(flag: str, entries: Sequence[str]) -> tuple[str, ...]:
        found = []
        for entry in entries:
            pattern, equals, factor = entry.partition("=")
            found += [f"{name}{equals}{factor}" for name in names(flag, pattern.strip())]
        return tuple(found)

    def names(flag: str, pattern: str) -> tuple[str, ...]:
        try:
            return expand(pattern, config.architecture)
        except ValueError as error:
            raise ValueError(f"--{flag} {error}") from None

    training = config.training
    optimizer = config.optimizer
    return replace(
        config,
        training=replace(training, trainable=written_out("training.trainable", training.trainable)),
        optimizer=replace(
            optimizer,
            no_decay=written_out("optimizer.no_decay", optimizer.no_decay),
            lr_multipliers=written_out("optimizer.lr_multipliers", optimizer.lr_multipliers),
        ),
    )
