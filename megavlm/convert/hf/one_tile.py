"""How an image processor of transformers makes one square tile of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.convert.hf.json_files import (
    class_of_image_processor,
    image_processor,
    image_processor_file,
    named,
    no_flags,
    no_sizes,
    refuse,
)

# What the names of classes begin with that crop unless they are told not to.
_CROPPING = ("clip", "llava")
_PADDING = "llava"
# To these, a size that is a number is that of both sides; to others, of the shorter edge.
_SQUARING = ("blip", "vit")


def read_tiling(folder: Path, kind: str) -> str:
    """Read how a square tile becomes of an image: ``pad``, ``crop`` or ``stretch``.

    Args:
        folder: of the model.
        kind: class of its image processor, if it names none.

    Raises:
        ValueError: its image processor does something else.
    """
    found = image_processor(folder)
    path = image_processor_file(folder)
    flags = ("do_resize", "do_center_crop", "do_pad")
    refuse(path, list(no_flags("", found, *flags)))
    kind = (class_of_image_processor(found) or kind).lower()
    # To transformers, null is no truth.
    crops = bool(found.get("do_center_crop", kind.startswith(_CROPPING)))
    pads = bool(found.get("do_pad")) and kind.startswith(_PADDING)
    size = _sides(found.get("size"), is_edge=not kind.startswith(_SQUARING))
    cut = _sides(found.get("crop_size"), is_edge=False) if crops else {}
    refuse(path, [*_no_square("size", size), *_no_square("crop_size", cut)])
    refuse(path, list(_uneven(size, cut, crops=crops, pads=pads)))
    if pads:
        return "pad"
    return "crop" if crops and "height" not in size else "stretch"


def _sides(size: Any, *, is_edge: bool) -> Mapping[str, Any]:
    """Return a size as an object; a number alone is that of the shorter edge or of both sides."""
    if isinstance(size, Mapping):
        return size
    if size is None:
        return {}
    return {"shortest_edge": size} if is_edge else {"height": size, "width": size}


def _no_square(name: str, size: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a size is neither that of a square nor of the shorter edge."""
    given = {side: value for side, value in size.items() if value is not None}
    if given.keys() - {"height", "width", "shortest_edge"}:
        yield f"{name} is {dict(size)!r}, must have height and width, or shortest_edge"
    yield from no_sizes(name, given, *given)
    if given.get("height") != given.get("width"):
        yield f"{name} is {dict(size)!r}, must be a square"


def _uneven(
    size: Mapping[str, Any], cut: Mapping[str, Any], *, crops: bool, pads: bool
) -> Iterator[str]:
    """Yield why images do not become squares, or lose an edge on the way."""
    if crops and bool(size) != bool(cut):
        given, absent = ("size", "crop_size") if size else ("crop_size", "size")
        yield f"{absent} is missing beside {given}, must be the same, not transformers' default"
    sides = {*size.values(), *cut.values()} - {None}
    if crops and len(sides) > 1:
        yield (
            f"size is {dict(size)!r} and crop_size is {dict(cut)!r}, must be the same: images are"
            " cropped at two opposite edges alone"
        )
    if "shortest_edge" in size and not crops and not pads:
        yield (
            f"{named('size', 'shortest_edge')} is {size['shortest_edge']!r} and do_center_crop is"
            " False: images would not become squares"
        )
