"""Packs of samples that are made when they are asked for; nothing is on the disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.pack_format import pack_block
from megavlm.data.store.reader import Pack, Reader, parse_pack


class MemoryReader(Reader):
    """Packs whose samples are in memory.

    Args:
        packs: the samples of each pack.
        manifest: the facts of the packs.
        folder: what messages call the packs.
    """

    def __init__(self, packs: Sequence[Sequence[Sample]], manifest: Manifest, folder: str) -> None:
        self.packs = packs
        self.manifest = manifest
        self.folder = folder
        self.index = np.stack(
            [pack_block(self.samples(i, load=False))[1] for i in range(len(self))]
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.packs, self.manifest, self.folder)

    def __len__(self) -> int:
        return len(self.packs)

    def samples(self, pack_id: int, *, load: bool) -> Sequence[Sample]:
        """Return the samples of a pack; without ``load`` their images need no content."""
        return self.packs[pack_id]

    def _read(self, pack_id: int, with_images: bool) -> Pack:
        (head, *images), record = pack_block(self.samples(pack_id, load=with_images))
        return parse_pack(
            pack_id,
            record,
            np.frombuffer(head, np.uint8),
            np.frombuffer(b"".join(images), np.uint8),
        )
