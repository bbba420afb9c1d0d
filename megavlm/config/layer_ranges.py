"""Ranges of layers in a configuration, such as ``vision.layers.-4:``, as the names they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megavlm.config.lora import Lora, linear_names
from megavlm.config.schema import Architecture, Config

_LAYERS = re.compile(r"(vision|language)\.layers\.(-?\d+)?(:)?(-?\d+)?")
_STACKS = {"vision": "vision.encoder.layers", "language": "language.decoder.layers"}


def expand(pattern: str, architecture: Architecture) -> tuple[str, ...]:
    """Return the names of layers that a range such as ``vision.layers.-4:`` means, which is read as
    a slice of Python; any other pattern is returned as it is.

    Raises:
        ValueError: the range holds no layer.
    """
    found = _LAYERS.fullmatch(pattern)
    if not found:
        return (pattern,)
    part, first, colon, end = found.groups()
    count = getattr(architecture, part).num_layers
    layers = range(count)
    start = int(first) if first else None
    if colon:
        chosen = layers[start : int(end) if end else None]
    else:
        chosen = [layers[start]] if start is not None and -count <= start < count else []
    if not chosen:
        there = f"{part} layers 0 to {count - 1}" if count else f"no {part} layers"
        raise ValueError(f"{pattern}: no such layers; the model has {there}")
    return tuple(f"{_STACKS[part]}.{number}" for number in chosen)


def _adapted_parts(lora: Lora, architecture: Architecture) -> list[str]:
    """Return the parts of the model that have adapters."""
    experts = {"vision": 0, "language": architecture.language.num_experts}
    return [
        part
        for part, stack in _STACKS.items()
        if any(
            lora.adapts(f"{stack}.{number}.{name}.weight")
            for number in range(getattr(architecture, part).num_layers)
            for name in linear_names(experts[part])
        )
    ]


def with_layers(config: Config) -> Config:
    """Write out every range of layers, so that nothing but names and patterns of names is left,
    and add LoRA adapters to the freeze mask.

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
    lora = replace(
        config.architecture.lora,
        targets=written_out("architecture.lora.targets", config.architecture.lora.targets),
        nf4=written_out("architecture.lora.nf4", config.architecture.lora.nf4),
    )
    adapters = [
        f"{part}.*.lora"
        for part in _adapted_parts(lora, config.architecture)
        if f"{part}.*.lora" not in training.trainable
    ]
    optimizer = config.optimizer
    return replace(
        config,
        architecture=replace(config.architecture, lora=lora),
        training=replace(
            training,
            trainable=(*written_out("training.trainable", training.trainable), *adapters),
            frozen_until=written_out("training.frozen_until", training.frozen_until),
        ),
        optimizer=replace(
            optimizer,
            no_decay=written_out("optimizer.no_decay", optimizer.no_decay),
            lr_multipliers=written_out("optimizer.lr_multipliers", optimizer.lr_multipliers),
        ),
    )
