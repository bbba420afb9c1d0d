"""Which row of a Q-Former sees which: queries, and texts beside them (BLIP-2, arXiv 2301.12597,
figure 2).

Shape letters: I tiles, Q queries, L tokens of a text, R rows: the queries, then each text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["bidirectional", "causal", "separate"]
"""How a text and the queries see each other.

bidirectional: all see all (image-text matching, and the instructions of InstructBLIP). causal: the
text sees the queries and its own tokens up to each; the queries do not see it (text generation).
separate: text and queries do not see each other (contrast).
"""


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """A text beside the queries.

    Args:
        mode: what it sees, and whether the queries see it.
        real: bool [I, L], false for padding, which no other row sees.
    """

    mode: Mode
    real: Tensor


def seen_by(queries: int, texts: Sequence[TextRows]) -> Tensor:
    """Say which row sees which; texts never see each other.

    So one pass over several texts gives what a pass with each of them alone gives, unless one is
    bidirectional, which changes the queries.

    Args:
        queries: Q; 0: none are there.
        texts: one or more, in the order of the rows.

    Returns:
        bool [I, 1, R, R], rows see columns. Each row sees itself, so that padding is finite.
    """
    first = texts[0].real
    tiles = len(first)
    rows = queries + sum(text.real.shape[1] for text in texts)
    seen = torch.zeros(tiles, rows, rows, dtype=torch.bool, device=first.device)
    seen[:, :queries, :queries] = True
    start = queries
    for text in texts:
        end = start + text.real.shape[1]
        own = text.real[:, None, :].expand(-1, end - start, -1)
        seen[:, start:end, start:end] = own.tril() if text.mode == "causal" else own
        if text.mode == "bidirectional":
            seen[:, :queries, start:end] = text.real[:, None, :]
        if text.mode != "separate":
            seen[:, start:end, :queries] = True
        start = end
    diagonal = torch.arange(rows, device=first.device)
    seen[:, diagonal, diagonal] = True
    return seen[:, None]
