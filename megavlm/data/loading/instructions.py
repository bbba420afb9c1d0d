"""Which instruction a Q-Former reads beside each tile of a pack."""

from __future__ import annotations

import numpy as np

from megavlm.data.loading.batch import Instructions
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Pack


def find_instructions(pack: Pack, manifest: Manifest, chosen: np.ndarray) -> Instructions | None:
    """Return the instructions of a rank's tiles, each that of the tile's sample; none if the packs
    have none.

    Args:
        pack: the pack.
        manifest: of the dataset.
        chosen: indices of the tiles; those beyond the pack's are padding.
    """
    most = manifest.instruction_length
    if not most:
        return None
    lengths = pack.provenance["instruction"].astype(np.int64)
    of_samples = np.zeros((len(lengths), most), np.int64)
    of_samples[np.arange(most) < lengths[:, None]] = pack.instructions
    samples = np.repeat(pack.images["sample"], pack.images["tiles"])
    samples = samples[chosen[chosen < len(samples)]]
    padding = len(chosen) - len(samples)
    return Instructions.of(
        tokens=np.pad(of_samples[samples], ((0, padding), (0, 0))),
        lengths=np.pad(lengths[samples], (0, padding)),
    )
