"""The slice of a pack that one rank computes if several ranks share the pack: some of its tiles,
and some of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """A rank's position among those that share a pack; the default has the whole pack.

    Args:
        tile_rank, tile_ranks: position among the ranks that split the tiles.
        context_rank, context_ranks: position among the context-parallel ranks.
    """

    tile_rank: int = 0
    tile_ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1

    def tiles(self, tiles: int, multiple: int) -> np.ndarray:
        """Return the indices of this rank's I tiles, int64 [I]. All ranks get the same number, at
        least one; indices from ``tiles`` on are padding tiles.

        Args:
            tiles: real tiles of the pack.
            multiple: what the number of a rank's tiles must be a multiple of.
        """
        count = -(-max(1, tiles) // (self.tile_ranks * multiple)) * multiple
        return np.arange(self.tile_rank * count, (self.tile_rank + 1) * count)

    def tokens(self, ends: np.ndarray) -> np.ndarray:
        """Return the positions in the pack of this rank's tokens, in the rank's order.

        The split is zig-zag: a sample is cut into twice as many pieces as there are ranks, and rank
        r takes piece r from the front and piece r from the back. So all ranks have the same work
        under a causal mask, in which late tokens attend to more than early ones. Transformer Engine
        splits in the same way (its ``thd_get_partitioned_indices``).

        Args:
            ends: int [N + 1], from 0 to T: where samples start and end.

        Returns:
            int64 [T / ranks]

        Raises:
            ValueError: a sample cannot be cut into equal pieces.
        """
        if self.context_ranks == 1:
            return np.arange(int(ends[-1]))
        count = 2 * self.context_ranks
        starts = ends[:-1].astype(np.int64)
        lengths = np.diff(ends).astype(np.int64)
        if np.any(lengths % count):
            raise ValueError(
                f"samples of {lengths[lengths % count > 0][:3].tolist()} tokens cannot be cut into"
                f" {count} equal pieces, as --parallel.context_parallel_size {self.context_ranks}"
                f" asks; pack with a multiple of --alignment {count}"
            )
        size = lengths // count
        firsts = np.stack(
            [starts + self.context_rank * size, starts + (count - 1 - self.context_rank) * size],
            axis=1,
        ).ravel()
        sizes = np.repeat(size, 2)
        return np.arange(sizes.sum()) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)


WHOLE_PACK = RankSlice()
