"""The answers of a pack of preferences: which tokens are whose, and the logarithm of the
probability that the reference model gives each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megavlm.data.loading.batch import Preferences
from megavlm.data.store.reader import Pack
from megavlm.data.store.reference import Reference

OnRank = Callable[[np.ndarray, int], np.ndarray]
"""Makes an array of all stored tokens one of this rank's tokens, with a filler for the others."""


def find_preferences(pack: Pack, on_rank: OnRank, reference: Reference | None) -> Preferences:
    """Return the answers of a pack; arguments as for ``Preferences``.

    Args:
        pack: of preferences.
        on_rank: makes arrays of this rank.
        reference: of the dataset; none: the probabilities are not there yet.

    Raises:
        ReadError: the reference has another number of pairs, or cannot be read.
    """
    answers = len(pack.lengths)
    return Preferences.of(
        answers=on_rank(np.repeat(np.arange(answers), pack.lengths), answers),
        reference=reference.of_pack(pack.pack_id, answers // 2) if reference else None,
    )
