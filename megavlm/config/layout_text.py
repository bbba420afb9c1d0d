"""A pipeline's layout as text, such as ``v*24,c,t*4|t*9|t*9|t*6,h``: chunks with ``|`` between
them, and what stands in each, in order.

``v`` is a layer of the vision encoder, ``t`` one of the language model, ``c`` the connector with
the token embedding, ``h`` final norm and head; ``v*24`` is ``v`` 24 times. ``c`` goes with the
first ``t``, ``h`` with the last; both may be left out of the text. Without a language model both
go with the last ``v``. ``p`` (projector), the letter of
older versions, is read as ``c``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

_PIECE = re.compile(r"([vcpth])(?:\*([0-9]+))?")


def parse_layout(text: str, vision_layers: int, language_layers: int) -> tuple[int, ...]:
    """Layers of each chunk, vision encoder and language model counted through.

    Args:
        text: the layout.
        vision_layers: of the model.
        language_layers: of the model.

    Raises:
        ValueError: the text is not a layout of such a model; says why.
    """
    chunks = [_letters(part) for part in text.split("|")]
    order = "".join(chunks)
    wanted = {"v": vision_layers, "t": language_layers}
    for letter, name in (("v", "vision encoder"), ("t", "language model")):
        if order.count(letter) != wanted[letter]:
            raise ValueError(
                f"has {order.count(letter)} x {letter}, but the {name} has {wanted[letter]} layers"
            )
    if not re.fullmatch("v*c?t*h?", order):
        raise ValueError("must name layers in the order v, c, t, h")
    counts = tuple(sum(letter in "vt" for letter in chunk) for chunk in chunks)
    if 0 in counts:
        raise ValueError("each chunk must have a layer")
    if language_layers and "c" in order and not any("ct" in chunk for chunk in chunks):
        raise ValueError("c must stand in one chunk with the first t")
    return counts


def write_layout(counts: Sequence[int], vision_layers: int) -> str:
    """Write a layout as text, with ``c`` and ``h``, from the number of layers of each chunk."""
    chunks = []
    start = 0
    for count in counts:
        layers = "".join(
            "v" if layer < vision_layers else "ct" if layer == vision_layers else "t"
            for layer in range(start, start + count)
        )
        chunks.append(layers)
        start += count
    chunks[-1] += "h" if start > vision_layers else "ch"
    return "|".join(
        ",".join(_short(letter, len(list(same))) for letter, same in groupby(chunk))
        for chunk in chunks
    )


def _letters(chunk: str) -> str:
    found = [(piece, _PIECE.fullmatch(piece.strip())) for piece in chunk.split(",")]
    for piece, match in found:
        if match is None:
            raise ValueError(
                f"{piece.strip() or 'nothing'!r} is none of v, c, t, h, nor one of them with a"
                " number, such as t*4"
            )
    letters = "".join(match[1] * int(match[2] or 1) for _, match in found if match)
    return letters.replace("p", "c")


def _short(letter: str, count: int) -> str:
    return letter if count == 1 else f"{letter}*{count}"
