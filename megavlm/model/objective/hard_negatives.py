"""Wrong partners for the pairs of a pool: the more similar, the likelier (ALBEF, arXiv 2107.07651,
section 3.2; BLIP-2).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def draw_negatives(similarities: Tensor, own: Tensor, draws: Tensor) -> Tensor:
    """Draw a partner for each row, with the softmax of its similarities as probabilities, its own
    left out.

    It depends on the similarities and the given draws alone, not on a random state, so that every
    layout draws the same.

    Args:
        similarities: [n, G], divided by the temperature.
        own: column of each row's own partner, int64 [n].
        draws: uniform in [0, 1), [n].

    Returns:
        columns, int64 [n]; meaningless if G is 1.
    """
    others = similarities.double().scatter(1, own[:, None], float("-inf"))
    sums = others.softmax(dim=1).cumsum(dim=1)
    wanted = draws.double()[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True)[:, 0]
    return found.clamp(max=similarities.shape[1] - 1)
