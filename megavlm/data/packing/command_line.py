"""The command line of ``tools/pack_dataset.py``, and the job that it asks for."""

from __future__ import annotations

import argparse
import os

from megavlm.config.architecture import PIXELS, Architecture
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling, features_per_tile
from megavlm.data.packing.job import Job
from megavlm.data.records.meta_file import read_sources

DESCRIPTION = "Turn images, videos and texts into a packed dataset for training."
EXAMPLE = """example:
  python tools/pack_dataset.py --model internvl2_5-1b --tokenizer Qwen2.5-0.5B-Instruct/ \\
      --jsonl chats.jsonl --root images/ --capacity 16384 --out packs/chats
The folder --out appears when it is complete; its rejects.jsonl lists the records that cannot be
used.
"""
OPTIONS = (
    ("image_size", None, "side of a tile in pixels (default: the model's, or 448)"),
    ("patch_size", None, "side of a patch in pixels (default: the model's, or 14)"),
    (
        "pixel_shuffle",
        None,
        "patches along a side that become one feature (default: the model's, or 2)",
    ),
    ("template", "internvl2_5", "conversation template (default: %(default)s)"),
    ("capacity", 16384, "tokens of a pack (default: %(default)s)"),
    ("min_tiles", 1, "fewest tiles of an image, thumbnail not counted (default: %(default)s)"),
    (
        "max_tiles",
        12,
        "most tiles of a record's images, thumbnails not counted (default: %(default)s)",
    ),
    (
        "tiling",
        "dynamic",
        "dynamic, or pad: each image one tile, filled up to a square (default: %(default)s)",
    ),
    ("min_frames", 8, "fewest frames of a video that has as many (default: %(default)s)"),
    ("max_frames", 32, "most frames of a video, a tile each (default: %(default)s)"),
    (
        "frame_sampling",
        "rand",
        "rand, middle, or frames a second such as fps0.5 (default: %(default)s)",
    ),
    (
        "tile_cap",
        "auto",
        "most tiles of a pack; auto (default): just above the mean, so that packs cost alike",
    ),
    (
        "tile_multiple",
        1,
        (
            "what an auto --tile_cap is a multiple of: what training fills tiles up to, 4 or 16"
            " (default: %(default)s)"
        ),
    ),
    (
        "alignment",
        1,
        (
            "samples start at multiples of so many tokens in a pack, 2 x CP for context parallelism"
            " (default: %(default)s)"
        ),
    ),
    (
        "levels",
        0,
        (
            "levels of difficulty for a curriculum, of as many samples each; 0: one for each"
            " difficulty (default: %(default)s)"
        ),
    ),
    ("seed", 0, "fixes the order of the packs (default: %(default)s)"),
    (
        "workers",
        os.cpu_count() or 1,
        "processes; 0: this one only (default: all cores, %(default)s)",
    ),
    (
        "max_rejects",
        0.01,
        "largest share of the records that may be unusable (default: %(default)s)",
    ),
)
PASSED_ON = (
    "tokenizer",
    "out",
    "template",
    "capacity",
    "tile_multiple",
    "alignment",
    "levels",
    "seed",
    "workers",
    "max_rejects",
    "executor",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_mutually_exclusive_group(required=True)
    add = parser.add_argument
    data.add_argument(
        "--meta",
        metavar="FILE",
        help="JSON list of annotation files: {name: {root, annotation, repeat_time, ...}}",
    )
    data.add_argument(
        "--jsonl",
        metavar="FILE",
        help="annotations: .jsonl, .json, .parquet, .tar, a pattern, or an Energon dataset",
    )
    add(
        "--root",
        metavar="DIR",
        default="",
        help="folder that image paths in --jsonl are relative to",
    )
    add(
        "--tokenizer", metavar="DIR", required=True, help="folder of the language model's tokenizer"
    )
    add("--out", metavar="DIR", required=True, help="folder to make; must be missing or empty")
    add(
        "--model",
        metavar="NAME",
        help=(
            "model, or Hugging Face folder, that the packs are for: gives the next three sizes, and"
            " the pixels"
        ),
    )
    for name, default, text in OPTIONS:
        add(
            f"--{name}",
            type=int if default is None else type(default),
            default=default,
            metavar="N",
            help=text,
        )
    add(
        "--pixels",
        choices=sorted(PIXELS),
        help=(
            "mean and deviation that the model takes off its pixels (default: the model's, or"
            " imagenet)"
        ),
    )
    add(
        "--data_augment",
        action="store_true",
        help="let images of --jsonl be changed at random while training (see --data.augment there)",
    )
    add(
        "--difficulty",
        metavar="KEY",
        help="field of the records in --jsonl with their difficulty, a number, for a curriculum",
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
        help="trust images whose header can be read, instead of seeing that each can be decoded",
    )
    add(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="where workers run (default: %(default)s)",
    )
    add("--dry_run", action="store_true", help="plan and report, without writing packs")
    add("--picture", metavar="FILE", help="draw the report, with matplotlib")
    add("--json", metavar="FILE", help="also write the report's figures there")
    return parser.parse_args(arguments)


def make_job(args: argparse.Namespace, model: Architecture) -> Job:
    """What the command line asks for, for a ``model``; raises ValueError or FileNotFoundError,
    naming the flag, where it cannot be.
    """
    sizes = {
        "image_size": model.vision.image_size,
        "patch_size": model.vision.patch_size,
        "pixel_shuffle": model.pixel_shuffle,
    }
    given = vars(args)
    size, patch, shuffle = (
        known if given[name] is None else given[name] for name, known in sizes.items()
    )
    mean, std = (
        (model.vision.pixel_mean, model.vision.pixel_std)
        if args.pixels is None
        else PIXELS[args.pixels]
    )
    if args.tile_cap != "auto" and not args.tile_cap.isdecimal():
        raise ValueError(f"--tile_cap {args.tile_cap}: must be a number or auto")
    return Job(
        sources=read_sources(
            args.meta, args.jsonl, args.root, augment=args.data_augment, difficulty=args.difficulty
        ),
        features_per_tile=features_per_tile(size, patch, shuffle),
        tiling=Tiling(
            tile_size=size,
            min_tiles=args.min_tiles,
            max_tiles=args.max_tiles,
            thumbnail=args.thumbnail,
            mode=args.tiling,
            pixel_mean=mean,
        ),
        pixel_std=std,
        frames=FrameChoice(
            min_frames=args.min_frames, max_frames=args.max_frames, sampling=args.frame_sampling
        ),
        tile_cap=None if args.tile_cap == "auto" else int(args.tile_cap),
        decode_images=not args.headers_only,
        **{name: given[name] for name in PASSED_ON},
    )
