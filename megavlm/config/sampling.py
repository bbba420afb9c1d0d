"""How packs are drawn from several packed datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

Sampling = Literal["packs", "sqrt"]
# Weights are rounded to shares of so many positions in the order of packs.
BLOCK = 2**16


def shares_of(
    given: Sequence[float], sampling: Sampling, packs: Sequence[int], samples: Sequence[int]
) -> tuple[float, ...]:
    """Return the share of the packs that are drawn from each dataset, compared with the others.

    Args:
        given: shares that were asked for; empty: as ``sampling`` says.
        sampling: packs: each dataset as often as it has packs; sqrt: its samples come in proportion
            to the square root of their number (InstructBLIP, arXiv 2305.06500, section 2.4).
        packs, samples: of each dataset.
    """
    if given:
        return tuple(given)
    if sampling == "packs":
        return tuple(map(float, packs))
    # A pack has samples / packs of them.
    pairs = zip(packs, samples, strict=True)
    return tuple(count / math.sqrt(max(of_it, 1)) for count, of_it in pairs)


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """Return each weight's share of their sum, of the decimal numbers that were given: sums of
    floats differ between versions of Python (3.12 compensates), and remainders that are equal would
    be rounded this way or that.

    Args:
        weights: finite and above 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = sum(exact)
    return [weight / whole for weight in exact]


def whole_shares(weights: Sequence[float], block: int) -> list[int]:
    """Return the positions of a block that each weight has: its share, rounded by the largest
    remainders. Their sum is ``block``.

    Args:
        weights: as for ``exact_shares``.
        block: positions.
    """
    exact = [share * block for share in exact_shares(weights)]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda owner: exact[owner] % 1, reverse=True)
    for owner in by_remainder[: block - sum(counts)]:
        counts[owner] += 1
    return counts
