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


HOLDS: dict[str, Callable[[Architecture], Iterator[str]]] = {
    "native": _internvl,
    "chat": _internvl,
}
"""Yields, for each format, why it cannot hold a model."""
