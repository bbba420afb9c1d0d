"""The command line of ``tools/pack_dataset.py``."""

from __future__ import annotations

import argparse
from typing import get_args

from megavlm.config.former_names import GONE
from megavlm.config.hub_cache import cached
from megavlm.config.option_types import existing, new_file, new_picture, refuse_unwritable
from megavlm.config.vision import PIXELS, Resample
from megavlm.data.packing.asked_stage import add_stage_options, stage_settings
from megavlm.data.packing.option_tables import IMAGES, JOB, PACKS, SIZES, TEXTS, Option

DESCRIPTION = "Turn images, videos and texts into a packed dataset for training."
EXAMPLE = """example:
  python tools/pack_dataset.py --model internvl2_5-1b --tokenizer Qwen2.5-0.5B-Instruct/ \\
      --jsonl chats.jsonl --root images/ --capacity 16384 --out packs/chats
The folder --out appears when it is complete; its rejects.jsonl lists the records that cannot be
used. docs/formats.md says which records are read, docs/data.md how to choose the settings.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        reasons = [f"{flag}: {GONE[flag]}" for flag in unknown if flag in GONE]
        parser.error("; ".join(reasons) or f"unrecognized arguments: {' '.join(unknown)}")
    if not options.out and not options.dry_run:
        parser.error("--out is required, except with --dry_run")
    try:
        parser.set_defaults(**stage_settings(options.recipe, options.stage))
    except ValueError as error:
        parser.error(str(error))
    options = parser.parse_args(arguments)
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
    add_stage_options(parser)
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
            " cache), that the packs are for: sets --image_size, --patch_size, --tokens_per_tile,"
            " --pixels and --resample (default: the recipe's)"
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
    _add_switches_of_images(parser)
    add = parser.add_argument
    add("--dry_run", action="store_true", help="plan and report, without writing packs")
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
        "--preferences",
        action="store_true",
        help=(
            "each record has two answers to one prompt, chosen and rejected, for training on"
            " preferences (default: as the stage has it)"
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


def _add_switches_of_images(parser: argparse.ArgumentParser) -> None:
    """Add the options without values that are about images."""
    add = parser.add_argument
    add(
        "--data_augment",
        action="store_true",
        help="allow images of --jsonl to be augmented in training (see --data.augment there)",
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
    add(
        "--exif_rotation",
        action="store_true",
        help="turn images as their EXIF says, as transformers does when it loads a file",
    )
    add(
        "--scan_pixels",
        action="store_true",
        help="decode each image in the first pass too, so that --dry_run finds damaged ones",
    )
