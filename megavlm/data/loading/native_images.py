"""Tiles of images of any size for a vision encoder whose patches see all tiles of an image: which
rank has which image, and in which order its tiles stand.

A rank has whole images, in the order of the pack, and then padding tiles up to the number of the
rank with most: all have equally many. Each image goes, the largest first, to the rank with which
that number, and what the attention of the rank with most of it costs, stay lowest. The tiles of an
image stand in the order of its windows: row by row, and row by row in each of them. Windows at the
right and the lower edge are smaller (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1). All ranks find
the same from the sizes of the images alone.

Shapes: I tiles of a rank, N patches of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megavlm.data.images.feature_layout import Tiled, as_tiled
from megavlm.data.loading.batch import BatchOptions, Images
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Pack
from megavlm.io.storage import ReadError

# Tiles of an image whose patches attending to each other cost as much as all matrix products with
# weights: those of 7680 patches, with 1280 hidden and 3420 MLP units and no windows.
EVEN_TILES = 1920


class Share(NamedTuple):
    """What a rank has of a pack's tiles.

    Args:
        tiles: int64 [I], index of each tile in the pack; for padding those behind its last.
        pairs: int64 [V], those of them that show two frames of a video; none: no tile does.
        features: int64 [tiles of the pack], where each of them stands among all ranks' tiles, one
            rank after the other.
        images: where the rank's tiles stand in their images.
    """

    tiles: np.ndarray
    pairs: np.ndarray | None
    features: np.ndarray
    images: Images


def share_images(
    folder: Path | str, pack: Pack, manifest: Manifest, options: BatchOptions
) -> Share:
    """Share out the images of a pack.

    Args:
        folder: of the dataset, for messages.
        pack: the pack.
        manifest: of the dataset.
        options: says which rank of how many this is, and what windows and tiles are.

    Raises:
        ReadError: the tiles of an image are not those of its grid, or not one placeholder each.
    """
    refuse_other_tiles(folder, pack, manifest)
    is_second = second_frames(pack)
    images = as_tiled(pack.images[~is_second])
    are_pairs = np.append(is_second, False)[1:][~is_second]
    own = options.rank_slice
    ranks = deal([image.tiles for image in images], own.tile_ranks)
    firsts = np.cumsum([0, *(image.tiles for image in images)])
    orders = [_window_order(image, options.window_tiles) for image in images]
    most = max(1, *(sum(images[number].tiles for number in numbers) for numbers in ranks))
    count = -(-most // options.tile_multiple) * options.tile_multiple
    features = np.zeros(firsts[-1], np.int64)
    for rank, numbers in enumerate(ranks):
        place = rank * count
        for number in numbers:
            order = firsts[number] + orders[number].tiles
            features[order] = np.arange(place, place + len(order))
            place += len(order)
    numbers = ranks[own.tile_rank]
    tiles = [firsts[number] + orders[number].tiles for number in numbers]
    padding = count - sum(map(len, tiles))
    of_pairs = np.flatnonzero(np.repeat(are_pairs[numbers], list(map(len, tiles))))
    tiles.append(np.arange(firsts[-1], firsts[-1] + padding))
    orders = [*(orders[number] for number in numbers), *[_PADDING] * padding]
    own_tiles = np.concatenate(tiles)
    pairs = own_tiles[of_pairs] if len(of_pairs) else None
    return Share(own_tiles, pairs, features, _images(orders, options, of_pairs))


def second_frames(pack: Pack) -> np.ndarray:
    """Return which images of a pack are read together with the one before, bool [images]."""
    return pack.images["tiles"] == 0


def refuse_other_tiles(folder: Path | str, pack: Pack, manifest: Manifest) -> None:
    """Raise ReadError if images are no grids of tiles with one placeholder token each."""
    table = pack.images
    grids = table["columns"] * table["rows"]
    is_second = second_frames(pack)
    before = np.append(0, np.where(is_second, 0, grids))[:-1]
    others = np.flatnonzero(np.where(is_second, before, table["tiles"]) != grids)
    if len(others) or (len(grids) and manifest.features_per_tile != 1):
        raise ReadError(
            f"{folder}: packed with --tiling {manifest.tiling} and {manifest.features_per_tile}"
            " placeholder tokens for a tile, but the model reads images as grids of tiles with one"
            " each; pack with --tiling native"
        )


class _Order(NamedTuple):
    """The tiles of an image, window by window.

    Args:
        tiles: int64 [tiles], indices in the image, row by row.
        rows, columns: int64 [tiles], of each of them.
        windows: tiles of each window.
    """

    tiles: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    windows: tuple[int, ...]


_PADDING = _Order(*(np.zeros(1, np.int64) for _ in range(3)), (1,))


def _window_order(image: Tiled, side: int) -> _Order:
    """Return the tiles of an image in windows of ``side`` tiles a side; 0: in one window."""
    rows, columns = np.divmod(np.arange(image.columns * image.rows), image.columns)
    if not side:
        return _Order(np.arange(len(rows)), rows, columns, (len(rows),))
    across = -(-image.columns // side)
    window = rows // side * across + columns // side
    tiles = np.argsort(window, kind="stable")
    sizes = np.bincount(window)
    return _Order(tiles, rows[tiles], columns[tiles], tuple(sizes.tolist()))


def deal(tiles: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal images out to ranks; return the numbers of each rank's images, ascending.

    Args:
        tiles: of each image.
        ranks: how many.
    """
    if ranks == 1:
        return [list(range(len(tiles)))]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    work = np.zeros(ranks, np.int64)
    attention = np.zeros(ranks, np.int64)
    for number in sorted(range(len(tiles)), key=lambda number: (-tiles[number], number)):
        count = tiles[number]
        most = np.maximum(work.max(), work + count)
        cost = EVEN_TILES * most + np.maximum(attention.max(), attention + count**2)
        rank = int(np.lexsort((work, cost))[0])
        dealt[rank].append(number)
        work[rank] += count
        attention[rank] += count**2
    return [sorted(numbers) for numbers in dealt]


def _images(orders: list[_Order], options: BatchOptions, pairs: np.ndarray) -> Images:
    """Return where the patches of a rank's tiles stand in their images; ``pairs`` are the tiles
    that show two frames.
    """
    grid = options.tile_grid
    inner = np.arange(grid**2)
    rows = np.concatenate([order.rows for order in orders])[:, None] * grid + inner // grid
    columns = np.concatenate([order.columns for order in orders])[:, None] * grid + inner % grid
    patches = grid**2
    lengths = tuple(len(order.tiles) * patches for order in orders)
    windows = tuple(size * patches for order in orders for size in order.windows)
    has_windows = options.window_tiles > 0
    sizes = [[(order.rows.max() + 1) * grid, (order.columns.max() + 1) * grid] for order in orders]
    return Images.of(
        places=np.stack([rows.ravel(), columns.ravel()]),
        sizes=np.repeat(np.array(sizes).T, lengths, axis=1),
        ends=_ends(lengths),
        lengths=lengths,
        window_ends=_ends(windows) if has_windows else None,
        window_lengths=windows if has_windows else (),
        pairs=pairs if len(pairs) else None,
    )


def _ends(lengths: tuple[int, ...]) -> np.ndarray:
    """Return where spans of these lengths, side by side, start and end; int32."""
    return np.cumsum([0, *lengths]).astype(np.int32)
