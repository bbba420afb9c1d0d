"""The command line of ``tools/pack_dataset.py``."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import get_args

from megavlm.config.former_names import GONE
from megavlm.config.hub_cache import cached
from megavlm.config.option_types import existing, new_file, new_picture, refuse_unwritable
from megavlm.config.vision import PIXELS, Resample
from megavlm.data.images.anyres import LLAVA_GRIDS, grids_text
from megavlm.data.images.tiling import FUYU_LIMIT
from megavlm.data.text.templates import FORMATS

DESCRIPTION = "Turn images, videos and texts into a packed dataset for training."
EXAMPLE = """example:
  python tools/pack_dataset.py --model internvl2_5-1b --tokenizer Qwen2.5-0.5B-Instruct/ \\
      --jsonl chats.jsonl --root images/ --capacity 16384 --out packs/chats
The folder --out appears when it is complete; its rejects.jsonl lists the records that cannot be
used. docs/formats.md says which records are read, docs/data.md how to choose the settings.
"""


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
    Option(name="image_size", text="side of a tile in pixels (default: the model's, or 448)"),
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
            " images of any size (patches); or the whole image and a grid that it is fitted into"
            " (anyres), or that for records of one image, with fewer features of large grids, and"
            " one padded tile for each image of a record of several (anyres_max_9) (default:"
            " %(default)s)"
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
        name="min_frames",
        default=8,
        text="fewest frames of a video that has as many (default: %(default)s)",
    ),
    Option(
        name="max_frames",
        default=32,
        text="most frames of a video, a tile each (default: %(default)s)",
    ),
    Option(
        name="frame_sampling",
        default="rand",
        metavar="MODE",
        text="rand, middle, or frames per second such as fps0.5 (default: %(default)s)",
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
        text=f"conversation template: {', '.join(FORMATS)} (default: %(default)s)",
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
    Option(name="capacity", default=16384, text="tokens of a pack (default: %(default)s)"),
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        reasons = [f"{flag}: {GONE[flag]}" for flag in unknown if flag in GONE]
        parser.error("; ".join(reasons) or f"unrecognized arguments: {' '.join(unknown)}")
    if not options.out and not options.dry_run:
        parser.error("--out is required, except with --dry_run")
    refuse_unwritable(parser, options)
    return options


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_files(parser)
    _add_outputs(parser)
    _add_options(parser, "model", SIZES)
    _add_model_options(parser)
    _add_options(parser, "images and videos", IMAGES)
    _add_options(parser, "texts", TEXTS)
    parser.add_argument(
        "--system",
        metavar="TEXT|none",
        help=(
            "system message of conversations that have none (default: the template's); none: begin"
            " with the user's turn"
        ),
    )
    _add_options(parser, "packs", PACKS)
    _add_options(parser, "job", JOB)
    _add_switches(parser)
    return parser


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the options that name annotation files."""
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--meta",
        metavar="FILE",
        help="JSON object of annotation files: {name: {root, annotation, repeat_time, ...}}",
    )
    data.add_argument(
        "--jsonl",
        metavar="FILE",
        help="annotations: .jsonl, .json, .parquet, .tar, a URL of one, a pattern, or the folder"
        " of an Energon dataset or imagefolder",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        default="",
        help="folder that image paths in --jsonl are relative to",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name other files."""
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="DIR",
        required=True,
        type=existing,
        help="folder of the language model's tokenizer, or an id in the hub's cache",
    )
    add(
        "--qformer_tokenizer",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of the tokenizer of what a Q-Former reads, for --template instructblip"
        " (default: qformer_tokenizer/ in the folder of --tokenizer)",
    )
    add("--out", metavar="DIR", help="folder to make; must be missing or empty")
    add("--picture", metavar="FILE", type=new_picture, help="plot the report, with matplotlib")
    add("--json", metavar="FILE", type=new_file, help="also write the report's figures there")


def _add_options(parser: argparse.ArgumentParser, title: str, options: tuple[Option, ...]) -> None:
    """Add options with values, as a group of the help."""
    group = parser.add_argument_group(title)
    for option in options:
        group.add_argument(
            f"--{option.name}",
            type=int if option.default is None else type(option.default),
            default=option.default,
            metavar=None if option.choices else option.metavar,
            choices=option.choices,
            help=option.text,
        )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the model."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        type=cached,
        help=(
            "model, recipe whose model (fuyu), or Hugging Face folder (or its id in the hub's"
            " cache), that the packs are for: sets --image_size, --patch_size, --tokens_per_tile"
            " --pixels and --resample"
        ),
    )
    parser.add_argument(
        "--pixels",
        choices=sorted(PIXELS),
        help=(
            "mean and standard deviation that the model normalises pixels with (default: the"
            " model's, or imagenet)"
        ),
    )
    parser.add_argument(
        "--resample",
        choices=get_args(Resample),
        help="how images are resized to tiles (default: the model's, or bicubic)",
    )


def _add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the options without values, and those of records."""
    add = parser.add_argument
    add(
        "--data_augment",
        action="store_true",
        help="allow images of --jsonl to be augmented in training (see --data.augment there)",
    )
    add(
        "--difficulty",
        metavar="KEY",
        help="field of the records in --jsonl with their difficulty, a number, for a curriculum",
    )
    add(
        "--near",
        metavar="DIR",
        default="",
        help=(
            "fill packs with similar records, for hard negatives: --out of tools/score_dataset.py"
            " --places, of the same files"
        ),
    )
    add(
        "--filter",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help=(
            "what records in --jsonl must be like, by the names of a meta file's filter, such as"
            " min_side=64 or scores=DIR min_score=0.28 (DIR: --out of tools/score_dataset.py)"
        ),
    )
    add(
        "--no_thumbnail",
        action="store_false",
        dest="thumbnail",
        help="do not add the whole image, small, to images of several tiles",
    )
    add(
        "--headers_only",
        action="store_true",
        help="trust images whose header can be read, instead of checking that each can be decoded",
    )
    add("--dry_run", action="store_true", help="plan and report, without writing packs")
    add(
        "--scan_pixels",
        action="store_true",
        help="decode each image in the first pass too, so that --dry_run finds damaged ones",
    )
