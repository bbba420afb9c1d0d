"""How a model is to be used, which its weights do not tell: conversation template and tile limits.

A trained model's is that of the packs it was trained on. A model that was only imported keeps what
its folder said.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.tiling import UNBOUNDED, VideoPixels
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    image_processor,
    image_processor_file,
    no_flags,
    no_sizes,
    no_texts,
    other_resizing,
    read_json,
    refuse,
    write_json,
)
from megavlm.data.images.native import QWEN2_VL_PIXELS
from megavlm.data.images.tiling import FUYU_LIMIT
from megavlm.data.store.manifest import FILE_NAME as MANIFEST_NAME
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import FORMATS, chat_format

_FILE_NAME = "usage.json"
_THUMBNAIL = "use_thumbnail"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a model is to be used.

    Args:
        template: name of the conversation template.
        system_message: what it says before a conversation.
        min_tiles: fewest tiles of an image, thumbnail not counted.
        max_tiles: most tiles of an image, thumbnail not counted.
        thumbnail: whether an image of several tiles gets its thumbnail as one more tile.
        tiling: ``dynamic``, or how each image becomes one tile: ``pad``, ``crop`` or ``stretch``;
            or ``patches`` or ``native``, or ``anyres`` or ``anyres_max_9``.
        image_limit: for ``patches``: width and height that larger images are made smaller to.
        min_pixels, max_pixels: for ``native``: fewest and most pixels of all tiles of an image.
        video: for ``native``: bounds of the frames of videos.
        grids: for the last two: columns and rows of the grids that images may have.
        is_trained: whether the model was trained here; otherwise a chat template that comes with
            the tokenizer is kept.
    """

    template: str = DEFAULT
    system_message: str = chat_format(DEFAULT).system_message
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    tiling: str = "dynamic"
    image_limit: tuple[int, int] = FUYU_LIMIT
    min_pixels: int = QWEN2_VL_PIXELS[0]
    max_pixels: int = QWEN2_VL_PIXELS[1]
    video: VideoPixels = UNBOUNDED
    grids: tuple[tuple[int, int], ...] = ()
    is_trained: bool = False

    @property
    def crops(self) -> bool:
        """Whether an image may become several tiles."""
        return self.tiling == "dynamic" and self.max_tiles > 1


def without_grid(template: str, **tiles: Any) -> Usage:
    """Return how a model is to be used for which no image becomes a grid of ``dynamic`` tiling;
    ``tiles`` are the fields of ``Usage`` that say what becomes of it.
    """
    message = chat_format(template).system_message
    return Usage(template=template, system_message=message, max_tiles=1, thumbnail=False, **tiles)


def of_chat(folder: Path) -> Usage:
    """Read the settings from a folder of ``InternVLChatModel``. Raises ValueError: they cannot
    be.
    """
    path = folder / FILE_NAME
    settings = read_json(path)
    of_text = no_texts("", settings, "template", "system_message")
    refuse(path, [*of_text, *no_flags("", settings, "pad2square")])
    usage = _tiles(path, settings, "min_dynamic_patch", "max_dynamic_patch")
    template = settings.get("template") or usage.template
    own = FORMATS[template].system_message if template in FORMATS else ""
    message = settings.get("system_message")
    # OpenGVLab's code, and the programs that load such a folder, do not read which way.
    refuse(image_processor_file(folder), list(other_resizing(image_processor(folder), "bicubic")))
    return dataclasses.replace(
        usage,
        template=template,
        system_message=own if message is None else message,
        tiling="pad" if settings.get("pad2square") else "dynamic",
    )


def of_native(folder: Path) -> Usage:
    """Read the settings from a folder of transformers. Raises ValueError: they cannot be."""
    path = image_processor_file(folder)
    found = image_processor(folder)
    usage = _tiles(path, found, "min_patches", "max_patches")
    if not usage.thumbnail:
        refuse(path, [f"{_THUMBNAIL} is False, must be True: transformers makes one all the same"])
    return usage


def _tiles(path: Path, found: dict[str, Any], least: str, most: str) -> Usage:
    refuse(path, [*no_sizes("", found, least, most), *no_flags("", found, _THUMBNAIL)])
    usual = Usage()
    thumbnail = found.get(_THUMBNAIL)
    return Usage(
        min_tiles=found.get(least) or usual.min_tiles,
        max_tiles=found.get(most) or usual.max_tiles,
        thumbnail=usual.thumbnail if thumbnail is None else thumbnail,
    )


def of_checkpoint(folder: Path) -> Usage:
    """Read the settings of a checkpoint: from the packs it was trained on, else from the folder
    that it was imported from. Packs of texts alone say nothing of images: what it was started from
    does, if the checkpoint has kept that.
    """
    kept = _read(folder)
    if (folder / MANIFEST_NAME).is_file():
        packs = read_manifest(folder)
        of_packs = Usage(
            template=packs.template,
            system_message=packs.system_message,
            min_tiles=packs.min_tiles,
            max_tiles=packs.max_tiles,
            thumbnail=packs.thumbnail,
            tiling=packs.tiling,
            image_limit=packs.image_limit,
            min_pixels=packs.min_pixels,
            max_pixels=packs.max_pixels,
            video=packs.video,
            grids=packs.grids,
            is_trained=True,
        )
        if packs.totals.tiles or kept is None:
            return of_packs
        texts = dict(template=packs.template, system_message=packs.system_message)
        return dataclasses.replace(kept, **texts, is_trained=True)
    return Usage() if kept is None else kept


def _read(folder: Path) -> Usage | None:
    """Read what ``write`` has written; none if it has not."""
    if not (folder / _FILE_NAME).is_file():
        return None
    facts = read_json(folder / _FILE_NAME)
    if "image_limit" in facts:  # JSON has no tuples
        facts["image_limit"] = tuple(facts["image_limit"])
    facts["grids"] = tuple(map(tuple, facts.get("grids", ())))
    facts["video"] = VideoPixels(**facts.get("video", {}))
    return Usage(**facts)


def write(usage: Usage, folder: Path) -> None:
    """Keep it in a checkpoint."""
    write_json(folder / _FILE_NAME, dataclasses.asdict(usage))
