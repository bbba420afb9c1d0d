"""What the image processor of an export does otherwise than training did, for the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.weights.tables import Dialect

_SQUARES = {"pad": "padded them", "crop": "took the square in their middle"}


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What the image processor of a format does.

    Args:
        tilings: in which images become one tile.
        makes_grids: whether it makes tiles of ``--tiling dynamic``.
        leaves_thumbnails: whether it can leave the thumbnail out.
        needs: the only tiling that it knows, and what it does, in words; none: any.
    """

    tilings: tuple[str, ...] = ("pad", "crop", "stretch")
    makes_grids: bool = False
    leaves_thumbnails: bool = False
    needs: tuple[str, str] | None = None


# Those that are not here make one tile of an image, in each of the ways.
_IMAGES: Mapping[Dialect, _Images] = {
    "native": _Images(tilings=("stretch",), makes_grids=True),
    "chat": _Images(tilings=("pad", "stretch"), makes_grids=True, leaves_thumbnails=True),
    "llava_next": _Images(needs=("anyres", "It also makes a grid of tiles")),
    "llava_onevision": _Images(needs=("anyres_max_9", "It also makes a grid of tiles")),
    "fuyu": _Images(needs=("patches", "It makes patches of images of any size")),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        _Images(
            needs=("native", "It resizes an image to whole tiles, as many as are near its size")
        ),
    ),
    "idefics": _Images(tilings=("stretch",)),
}


def limits(usage: Usage, dialect: Dialect) -> Iterator[str]:
    """Yield what the image processor of a format does otherwise than training, as sentences."""
    images = _IMAGES.get(dialect, _Images())
    if images.needs is not None:
        tiling, does = images.needs
        if usage.tiling != tiling:
            made = "other tiles" if usage.grids else "one tile"
            yield f"{does}; training made {made} (--tiling {usage.tiling})."
    elif usage.crops and not images.makes_grids:
        yield f"It makes one tile of an image; training made up to {usage.max_tiles}."
    elif usage.crops and not usage.thumbnail and not images.leaves_thumbnails:
        yield "It adds a thumbnail to images of several tiles; training did not."
    elif usage.tiling in _SQUARES and usage.tiling not in images.tilings:
        did = _SQUARES[usage.tiling]
        yield f"It stretches images to squares; training {did} (--tiling {usage.tiling})."
