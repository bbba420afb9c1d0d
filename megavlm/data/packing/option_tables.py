"""The options of ``tools/pack_dataset.py`` that have a value, in the groups of its help."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megavlm.data.images.anyres import LLAVA_GRIDS, grids_text
from megavlm.data.images.native import QWEN2_VL_PIXELS, QWEN3_VL_PIXELS
from megavlm.data.images.tiling import FUYU_LIMIT
from megavlm.data.text.templates import FORMATS


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option with a value.

    Args:
        name: without ``--``.
        default: sets its type too; None: a whole number without a default.
        metavar: what the help calls the value.
        text: of the help.
        choices: the values that are allowed; None: all of the type.
    """

    name: str
    default: str | int | float | None = None
    metavar: str = "N"
    text: str
    choices: tuple[str, ...] | None = None


SIZES = (
    Option(
        name="image_size",
        text="side of a tile in pixels (default: the stage's, the model's, or 448)",
    ),
    Option(
        name="patch_size",
        text="side of a patch in pixels, of which a tile's is a multiple (default: the model's, or"
        " 14)",
    ),
    Option(
        name="tokens_per_tile", text="placeholder tokens of a tile (default: what the model gives)"
    ),
)
IMAGES = (
    Option(
        name="min_tiles",
        text="for --tiling dynamic: fewest tiles of an image, thumbnail not counted (default: 1)",
    ),
    Option(
        name="max_tiles",
        text=(
            "for --tiling dynamic: most tiles of a record's images, thumbnails not counted"
            " (default: 12)"
        ),
    ),
    Option(
        name="tiling",
        default="dynamic",
        metavar="MODE",
        text=(
            "dynamic; or each image is one tile: padded to a square (pad), the square in its"
            " middle (crop), or stretched to a square (stretch); or each patch is one tile, for"
            " images of any size (patches); or an image has as many tiles as are nearest to its"
            " size (native); or the whole image and a grid that it is fitted into"
            " (anyres), or that for records of one image, with fewer features of large grids, and"
            " one padded tile for each image of a record of several (anyres_max_9) (default: the"
            " stage's, or %(default)s)"
        ),
    ),
    Option(
        name="grids",
        default="",
        metavar="CxR,...",
        text=(
            "for --tiling anyres and anyres_max_9: columns and rows of the grids that images may"
            " have (default: those of the folder that --model names, if its model has grids, else"
            f" {grids_text(LLAVA_GRIDS)}, and with anyres_max_9 all from 1x1 to 6x6)"
        ),
    ),
    Option(
        name="image_limit",
        default="",
        metavar="WxH",
        text=(
            "for --tiling patches: larger images are made smaller, to this width and height in"
            f" pixels (default: {FUYU_LIMIT[0]}x{FUYU_LIMIT[1]})"
        ),
    ),
    Option(
        name="min_pixels",
        text=(
            "for --tiling native: smaller images are made larger, to so many pixels in all"
            f" (default: that of the folder that --model names, or {QWEN2_VL_PIXELS[0]}, for"
            f" Qwen3-VL {QWEN3_VL_PIXELS[0]})"
        ),
    ),
    Option(
        name="max_pixels",
        text=(
            "for --tiling native: larger images are made smaller, to so many pixels in all"
            f" (default: that of the folder that --model names, or {QWEN2_VL_PIXELS[1]}, for"
            f" Qwen3-VL {QWEN3_VL_PIXELS[1]})"
        ),
    ),
    Option(
        name="video_min_pixels",
        text=(
            "for --tiling native: smaller frames of videos are made larger, to so many pixels"
            " (default: 128 tiles, for Qwen3-VL one)"
        ),
    ),
    Option(
        name="video_max_pixels",
        text=(
            "for --tiling native: larger frames of videos are made smaller, to so many pixels"
            " (default: 768 tiles)"
        ),
    ),
    Option(
        name="video_total_pixels",
        text=(
            "for --tiling native: frames of a video are made smaller, down to 1.05 times"
            " --video_min_pixels, until all of them have so many pixels, a pair counted as one"
            " frame (default: what fills 90%% of a pack)"
        ),
    ),
    Option(
        name="min_frames",
        text=(
            "fewest frames of a video that has as many (default: 8 for rand and middle, and 1 for"
            " frames per second; with --tiling native 4)"
        ),
    ),
    Option(
        name="max_frames",
        text=(
            "most frames of a video, a tile each unless --tiling native (default: 32; with"
            " --tiling native 768)"
        ),
    ),
    Option(
        name="frame_sampling",
        default="",
        metavar="MODE",
        text=(
            "rand, middle, or frames per second such as fps0.5 (default: rand; with --tiling native"
            " fps2)"
        ),
    ),
    Option(
        name="deep_images",
        default="clip",
        choices=("clip", "scale", "reject"),
        text=(
            "images of 16 or 32 bits a channel: clip values to 0-255 as InternVL does, scale them"
            " to 8 bits, or reject the record (default: %(default)s)"
        ),
    ),
)
TEXTS = (
    Option(
        name="template",
        default="internvl2_5",
        metavar="NAME",
        text=f"conversation template: {', '.join(FORMATS)} (default: the stage's, or %(default)s)",
    ),
    Option(
        name="truncate",
        default=0,
        text=(
            "cut the end of longer conversations off at N tokens, as LLaVA does (2048); 0: none;"
            " of pairs, texts at fewer tokens than the template, but not their last one"
        ),
    ),
    Option(
        name="instruction_length",
        default=0,
        text=(
            "most tokens of an instruction that a Q-Former reads too; the beginning of a longer one"
            " is cut off; 0: the template's (instructblip: 128)"
        ),
    ),
    Option(
        name="window_tokens",
        default=0,
        text=(
            "cut documents (records that are one text) into windows of at most N tokens; 0: do not"
            " cut (default: %(default)s)"
        ),
    ),
    Option(
        name="window_images",
        default=0,
        text="and of at most N images; 0: any number (default: %(default)s)",
    ),
)
PACKS = (
    Option(
        name="capacity",
        default=16384,
        text="tokens of a pack (default: the stage's, or %(default)s)",
    ),
    Option(
        name="tile_cap",
        default="auto",
        metavar="N|auto",
        text="most tiles of a pack; auto (default): just above the mean, which balances ranks",
    ),
    Option(
        name="tile_multiple",
        default=1,
        text=(
            "round an auto --tile_cap up to a multiple of this; training pads tiles to multiples of"
            " 4 or 16 (default: %(default)s)"
        ),
    ),
    Option(
        name="alignment",
        default=1,
        text=(
            "start samples at multiples of this in a pack; 2 x CP for context parallelism"
            " (default: %(default)s)"
        ),
    ),
    Option(
        name="levels",
        default=0,
        text=(
            "cut the records into this many levels of difficulty for a curriculum; 0: one for each"
            " difficulty (default: %(default)s)"
        ),
    ),
    Option(name="seed", default=0, text="seed of the order of the packs (default: %(default)s)"),
)
JOB = (
    Option(
        name="workers",
        default=os.cpu_count() or 1,
        text="processes; 0: this one only (default: all cores, %(default)s)",
    ),
    Option(
        name="max_rejects",
        default=0.01,
        metavar="SHARE",
        text="largest share of the records that may be rejected (default: %(default)s)",
    ),
    Option(
        name="executor",
        default="processes",
        choices=("processes", "ray"),
        text="where workers run (default: %(default)s)",
    ),
)
