"""The part of a pack that one rank computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavlm.config.schema import Architecture, Parallel
from megavlm.planner.partition import PackSize

_TILES = 4


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """The part of a microbatch that one rank computes.

    Args:
        tokens: positions of the language model.
        tiles: including padding tiles.
        supervised: tokens that the head runs on; none: all.
    """

    tokens: float
    tiles: float
    supervised: float | None = None

    @property
    def head_tokens(self) -> float:
        """Tokens that the head runs on."""
        return self.tokens if self.supervised is None else min(self.supervised, self.tokens)

    @classmethod
    def mean(
        cls,
        parallel: Parallel,
        capacity: int,
        tiles: float,
        supervised: float | None = None,
        image_tiles: float = 0.0,
    ) -> RankLoad:
        """Return the mean load of a rank.

        Args:
            parallel: the layout.
            capacity: tokens of the pack, with padding.
            tiles: real tiles of a pack, on average. Those of each pack are filled up to a multiple.
            supervised: tokens of a pack that the head runs on, on average; none: all.
            image_tiles: of an image, if each rank has whole images; 0: ranks share tiles.
        """
        shared = _with_padding(parallel, tiles, image_tiles, 0.5)
        filled = shared + (_multiple(parallel) - 1) / 2 if tiles else tiles
        return cls(
            tokens=capacity / parallel.context_parallel_size,
            tiles=filled / parallel.tile_ranks,
            supervised=None if supervised is None else supervised / parallel.context_parallel_size,
        )

    @classmethod
    def most(
        cls,
        parallel: Parallel,
        capacity: int,
        tiles: float,
        supervised: float | None = None,
        image_tiles: float = 0.0,
    ) -> RankLoad:
        """Return the load of a rank for a pack with this many real tiles.

        Args:
            parallel: the layout.
            capacity: tokens of the pack, with padding.
            tiles: of the pack.
            supervised: tokens of the pack that the head runs on; none: all.
            image_tiles: as for ``mean``.
        """
        shared = _with_padding(parallel, tiles, image_tiles, 1.0)
        filled = math.ceil(shared / _multiple(parallel)) * _multiple(parallel)
        return cls(
            tokens=capacity / parallel.context_parallel_size,
            tiles=filled / parallel.tile_ranks,
            supervised=None if supervised is None else supervised / parallel.context_parallel_size,
        )


def image_tiles(arch: Architecture, size: PackSize) -> float:
    """Return the tiles of the image that a tile of a pack is of, on average, if a rank needs all of
    them; else 0.
    """
    return size.squared_tiles / max(size.tiles, 1.0) if arch.vision.spans_tiles else 0.0


def _with_padding(parallel: Parallel, tiles: float, of_image: float, share: float) -> float:
    """Return the tiles of all ranks together. With whole images all have as many as the one with
    most: at most the mean and, but for a share of it, one image (R. Graham, Bounds for certain
    multiprocessing anomalies, 1966).

    Args:
        parallel: the layout.
        tiles: of the pack.
        of_image: tiles of an image; 0: ranks share tiles.
        share: of that image.
    """
    ranks = parallel.tile_ranks
    largest = min(of_image, tiles)
    return tiles if ranks == 1 else max(tiles + share * (ranks - 1) * largest, ranks * largest)


def _multiple(parallel: Parallel) -> int:
    """Return the number that the tiles of a pack are padded to a multiple of, over all ranks, with
    Transformer Engine's layers.
    """
    return parallel.tile_ranks * max(1, _TILES // parallel.tile_ranks)
