"""What one rank takes of a pack that several ranks work on together: some of its tiles, and some of
its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """A rank's place among those that work on the same pack; the default has the pack to itself.

    Args:
        tile_rank, tile_ranks: place among the ranks that share the tiles out.
        context_rank, context_ranks: place among the ranks that share the tokens out.
    """

    tile_rank: int = 0
    tile_ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1

    def tiles(self, tiles: int, multiple: int = 1) -> range:
        """Numbers of this rank's tiles. Every rank has as many, one at least; those from ``tiles``
        on are blank.

        Args:
            tiles: real tiles of the pack.
            multiple: what the number of a rank's tiles must be a multiple of.
        """
        count = -(-max(1, tiles) // (self.tile_ranks * multiple)) * multiple
        return range(self.tile_rank * count, (self.tile_rank + 1) * count)

    def tokens(self, ends: np.ndarray) -> np.ndarray:
        """Places in the pack of this rank's tokens, in the order in which the rank has them.

        A sample is cut into twice as many pieces as there are ranks, and rank r takes piece r from
        the front and piece r from the back. So under a causal mask, where late tokens see more than
        early ones, the ranks have the same work. Transformer Engine cuts in the same way (its
        ``thd_get_partitioned_indices``).

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
