"""The tiles of a pack's images, decoded as its dataset was packed for.

Shapes: I tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from megavlm.config.tiling import WITH_GRIDS
from megavlm.data.images import anyres, patches
from megavlm.data.images.augment import draw
from megavlm.data.images.decode import cut_fitted, decode_tiles
from megavlm.data.images.tiling import colour_of, pad_colour
from megavlm.data.images.transforms import decode_changed
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Pack
from megavlm.io.storage import ReadError


class TileDecoder:
    """Decodes tiles.

    Args:
        manifest: of the dataset.
        augment: changes that images of sources with ``data_augment`` go through: jpeg, crop, flip,
            colour.
        where: the dataset, for messages.
        origin: says where a sample of a pack comes from, likewise.
    """

    def __init__(
        self,
        manifest: Manifest,
        augment: Sequence[str],
        where: object,
        origin: Callable[[Pack, int], str],
    ) -> None:
        self.manifest = manifest
        self.augment = augment
        self.where = where
        self.origin = origin
        mode = manifest.tiling
        self.pad_colour = pad_colour(mode, manifest.pixel_mean)
        self.crops = mode == "crop"
        self.has_grids = mode in WITH_GRIDS
        self.cut = {"patches": self._patches}.get(mode, self._fitted if self.has_grids else None)
        self.on_white = mode == "native"
        self.upright = manifest.exif_rotation
        # Whether an image is only resized to its grid.
        self.is_plain = mode in ("dynamic", "stretch", "native")

    def decode(
        self,
        pack: Pack,
        chosen: ArrayLike,
        seed: int,
        position: int,
        black: int = 0,
        *,
        second_frames: bool = False,
    ) -> np.ndarray:
        """Decode the chosen tiles of a pack, uint8 [I, 3, S, S], black for indices beyond its own.
        Other images are not decoded.

        Args:
            pack: with its images.
            chosen: indices of tiles, each once; those of an image side by side.
            seed: the run's; with the position it fixes the random changes of images.
            position: of the pack in the run's order.
            black: side of the tiles of a pack without images; 0: that which it was packed for.
            second_frames: whether to decode the frames that are read together with those tiles.

        Raises:
            ReadError: an image that cannot be decoded.
        """
        size = self.manifest.image_size
        if black and not len(pack.images):
            size = black
        chosen = np.asarray(chosen, np.int64)
        tiles = np.zeros((len(chosen), 3, size, size), np.uint8)
        ends = np.cumsum(pack.images["tiles"], dtype=np.int64)
        owners = np.searchsorted(ends, chosen, side="right")
        borders = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
        for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            index = int(owners[first])
            if index == len(pack.images):
                continue
            row = pack.images[index]
            count = int(row["tiles"])
            wanted = chosen[first:last] - (ends[index] - count)
            is_whole = np.array_equal(wanted, np.arange(count))
            room = tiles[first:last]
            if not is_whole:  # only part of the image is chosen, or in another order
                room = np.empty((count, 3, size, size), np.uint8)
            try:
                self._decode_image(pack, index + second_frames, seed, position, room)
            # Whatever the decoder raises, the user has to learn which image it was.
            except Exception as error:
                origin = self.origin(pack, int(row["sample"]))
                raise ReadError(
                    f"{self.where}: pack {pack.pack_id}: image {index} of the pack, from the"
                    f" sample at {origin}, cannot be decoded: {type(error).__name__}: {error}"
                ) from error
            if not is_whole:
                tiles[first:last] = room[wanted]
        return tiles

    def _decode_image(
        self, pack: Pack, index: int, seed: int, position: int, room: np.ndarray
    ) -> None:
        """Decode all tiles of one image into ``room``."""
        row = pack.images[index]
        columns, rows = (int(row[name]) for name in ("columns", "rows"))
        count = len(room)
        is_frame = row["frames"] > 0
        size = self.manifest.image_size
        has_thumbnail = count > columns * rows
        operations = self.augment if self._is_augmented(pack, index) else ()
        if (self.is_plain or is_frame) and not operations:
            encoded = pack.image(index)
            resample = self.manifest.resample
            shown = self.on_white, self.upright
            decode_tiles(encoded, columns, rows, size, has_thumbnail, room, resample, *shown)
            return
        width = int(row["width"])
        height = int(row["height"])
        cut = None
        colour = self.pad_colour
        if is_frame:
            colour = None
        elif self.has_grids and count == 1:  # one of several images of its record
            colour = colour_of(self.manifest.pixel_mean)
        elif self.cut is not None:
            cut = partial(self.cut, (width, height), (columns, rows))
        decode_changed(
            pack.image(index),
            columns,
            rows,
            size,
            has_thumbnail,
            pad_colour=colour,
            crops=self.crops,
            cut=cut,
            change=draw(
                operations,
                count,
                seed=seed,
                position=position,
                index=_first_frame(pack, index),
                shape=width / height,
            ),
            out=room,
            resample=self.manifest.resample,
            on_white=self.on_white,
            upright=self.upright,
        )

    def _patches(
        self, size: tuple[int, int], grid: tuple[int, int], image: ArrayLike, out: np.ndarray
    ) -> np.ndarray:
        """Cut an image, which had ``size`` before it was changed, into patches."""
        fits = patches.fitted_size(*size, self.manifest.image_limit)
        return patches.cut_patches(image, fits, self.manifest.image_size, out)

    def _fitted(
        self, size: tuple[int, int], grid: tuple[int, int], image: ArrayLike, out: np.ndarray
    ) -> np.ndarray:
        """Fit an image, which had ``size`` before it was changed, into its grid."""
        side = self.manifest.image_size
        inner = anyres.fitted_size(*size, grid, side)
        pixels = np.asarray(image)
        return cut_fitted(pixels, *grid, side, inner, out, self.manifest.resample)

    def _is_augmented(self, pack: Pack, index: int) -> bool:
        """Whether an image goes through random changes."""
        source = int(pack.provenance["source"][pack.images["sample"][index]])
        return bool(self.augment) and self.manifest.sources[source].augment


def _first_frame(pack: Pack, index: int) -> int:
    """Return the first frame of the image in the text that an image is a frame of, so that all of
    them are changed alike; of an image that is none itself.
    """
    left = pack.images["frames"]
    while left[index] and index and left[index - 1] == left[index] + 1:
        index -= 1
    return index
