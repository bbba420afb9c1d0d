"""Which models each format of Hugging Face folders can hold.

A format's other facts stand in ``megavlm/convert/hf/hub_formats.py``, under the same names. This
one is known here, so that a run that could not export its model is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megavlm.config.architecture import Architecture


def _internvl(arch: Architecture) -> Iterator[str]:
    connector = arch.connector
    if arch.vision.family != "internvit" or connector.kind != "mlp" or not connector.norm:
        yield (
            "InternVL's formats hold --architecture.vision.family internvit with"
            " --architecture.connector.kind mlp and --architecture.connector.norm true; this model"
            f" is {arch.vision.family} with {connector.kind} and {str(connector.norm).lower()}"
        )
    if arch.image_tokens != "internvl":
        yield (
            "InternVL's formats have the image tokens of --architecture.image_tokens internvl; this"
            f" model has those of {arch.image_tokens}"
        )


def _llava(arch: Architecture) -> Iterator[str]:
    connector = arch.connector
    shuffles = connector.kind == "mlp" and (connector.pixel_shuffle != 1 or connector.norm)
    if arch.vision.family != "clip":
        yield (
            "LlavaForConditionalGeneration is written with --architecture.vision.family clip; this"
            f" model has {arch.vision.family}"
        )
    if connector.kind not in ("mlp", "linear") or shuffles:
        yield (
            "LlavaForConditionalGeneration has --architecture.connector.kind linear, or mlp with"
            " --architecture.connector.pixel_shuffle 1 and --architecture.connector.norm false;"
            f" this model has {connector.kind} with {connector.pixel_shuffle} and"
            f" {str(connector.norm).lower()}"
        )
    if arch.image_tokens != "llava":
        yield (
            "LlavaForConditionalGeneration has the image token of --architecture.image_tokens"
            f" llava; this model has those of {arch.image_tokens}"
        )


HOLDS: dict[str, Callable[[Architecture], Iterator[str]]] = {
    "native": _internvl,
    "chat": _internvl,
    "llava": _llava,
}
"""Yields, for each format, why it cannot hold a model."""
