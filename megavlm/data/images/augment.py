"""Light changes to images while training, drawn for each image from the seed, the epoch and the
sample.

``jpeg`` is InternVL's ``data_augment``: each tile is compressed with a quality of 75 to 100.
``crop`` cuts a part of 80 to 100% of the image's area, of nearly its shape; ``half_crop`` one of 50
to 100%, of 3:4 to 4:3, as the transform of BLIP-2 (arXiv 2301.12597) for training does; ``flip``
mirrors every second image; ``colour`` changes brightness, contrast and saturation by up to a fifth.
Cropping and mirroring move what boxes and words such as "left" are about: they are not for sources
with grounding or text in images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_QUALITY = 75
MOST_QUALITY = 100
LEAST_AREA = 0.8
MOST_STRETCH = 1.1
LEAST_HALF_AREA = 0.5
MOST_HALF_STRETCH = 4 / 3
MOST_COLOUR_CHANGE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What happens to one image; the fields' defaults are nothing.

    Args:
        box: left, top, right and bottom of the part that is cut, as shares of width and height.
        is_flipped: whether it is mirrored.
        colours: factors of brightness, contrast and saturation.
        qualities: of the JPEG of each tile; empty: none is made.
    """

    box: tuple[float, float, float, float] | None = None
    is_flipped: bool = False
    colours: tuple[float, float, float] | None = None
    qualities: tuple[int, ...] = ()


def draw(
    operations: Sequence[str],
    tiles: int,
    *,
    seed: int,
    position: int,
    index: int,
    shape: float = 1.0,
) -> Change:
    """Draw the change of an image.

    Args:
        operations: those that are switched on; the others draw their numbers too, so that switching
            one leaves the rest as they are.
        tiles: of the image.
        seed: of the run.
        position: the pack's index in the endless sequence of epochs, which the epoch and the pack
            determine.
        index: of the image in its pack.
        shape: width over height of the image.
    """
    # The draws of drop path take the counters with a second word of 0.
    rng = np.random.Generator(
        np.random.Philox(key=seed % 2**64, counter=[0, 1 + index, 0, position])
    )
    # One draw of each, whichever crop it is for.
    is_half = "half_crop" in operations
    least = LEAST_HALF_AREA if is_half else LEAST_AREA
    area = least + rng.random() * (1.0 - least)
    stretch = (MOST_HALF_STRETCH if is_half else MOST_STRETCH) ** rng.uniform(-1.0, 1.0)
    if is_half:
        stretch /= shape
    across = rng.random()
    down = rng.random()
    width = min(1.0, (area * stretch) ** 0.5)
    height = min(1.0, (area / stretch) ** 0.5)
    left = across * (1.0 - width)
    top = down * (1.0 - height)
    flip = rng.random() < 0.5
    colours = tuple(rng.uniform(1.0 - MOST_COLOUR_CHANGE, 1.0 + MOST_COLOUR_CHANGE, 3).tolist())
    qualities = tuple(rng.integers(LEAST_QUALITY, MOST_QUALITY + 1, tiles).tolist())
    return Change(
        box=(left, top, left + width, top + height) if is_half or "crop" in operations else None,
        is_flipped=flip and "flip" in operations,
        colours=colours if "colour" in operations else None,
        qualities=qualities if "jpeg" in operations else (),
    )
