"""The job that a command line of ``tools/pack_dataset.py`` asks for."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from megavlm.config.architecture import Architecture
from megavlm.config.tiling import NOTHING_STATED, UNBOUNDED, StatedTiles, VideoPixels
from megavlm.config.vision import PIXELS, Vision
from megavlm.data.images.anyres import LLAVA_GRIDS, USUAL_GRIDS, Grid, read_grids
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.native import PAIR, QWEN2_VL_PIXELS, QWEN3_VL_PIXELS, usual_video_pixels
from megavlm.data.images.tiling import FUYU_LIMIT, Tiling
from megavlm.data.packing.settings import Job
from megavlm.data.packing.windows import Windows
from megavlm.data.records.meta_file import read_sources
from megavlm.data.text.templates import chat_format

PASSED_ON = (
    "tokenizer",
    "qformer_tokenizer",
    "instruction_length",
    "template",
    "truncate",
    "capacity",
    "tile_multiple",
    "alignment",
    "levels",
    "near",
    "preferences",
    "seed",
    "workers",
    "max_rejects",
    "executor",
    "deep_images",
)


def make_job(
    args: argparse.Namespace, model: Architecture, stated: StatedTiles = NOTHING_STATED
) -> Job:
    """Return the job that a command line asks for.

    Args:
        args: the command line.
        model: what packs are for.
        stated: what the model's folder says of tiles, for what the command line does not say; for
            AnyRes without grids images may have those of the models that had its rule first.

    Raises:
        ValueError, FileNotFoundError: it cannot be done; names the flag.
    """
    given = vars(args)
    model = _with_sizes(model, args)
    mean, std = (
        (model.vision.pixel_mean, model.vision.pixel_std)
        if args.pixels is None
        else PIXELS[args.pixels]
    )
    if args.tile_cap != "auto" and not args.tile_cap.isdecimal():
        raise ValueError(f"--tile_cap {args.tile_cap}: must be a number or auto")
    return Job(
        sources=read_sources(
            args.meta,
            args.jsonl,
            args.root,
            augment=args.data_augment,
            difficulty=args.difficulty,
            keep=args.filter,
        ),
        out=args.out or "",
        features_per_tile=_tokens_per_tile(model, args.tokens_per_tile, args.template),
        tiling=Tiling(
            tile_size=model.vision.image_size,
            mode=args.tiling,
            pixel_mean=mean,
            resample=args.resample or model.vision.resample,
            limit=_limit(args.image_limit, args.tiling),
            grids=_grids(args.grids, args.tiling)
            or stated.grids
            or USUAL_GRIDS.get(args.tiling, LLAVA_GRIDS),
            **_of_dynamic_tiling(args),
            **_pixels(args, stated, model.vision.family),
            exif_rotation=args.exif_rotation,
            video=_video_pixels(args, stated, model.vision),
        ),
        pixel_std=std,
        frames=_frame_choice(args),
        windows=Windows(tokens=args.window_tokens, images=args.window_images),
        system_message="" if args.system == "none" else args.system,
        tile_cap=None if args.tile_cap == "auto" else int(args.tile_cap),
        decode_images=not args.headers_only,
        scan_pixels=args.scan_pixels,
        **{name: given[name] for name in PASSED_ON},
    )


def _limit(text: str, tiling: str) -> tuple[int, int]:
    """Read the largest size of an image. Raises ValueError: it is not two numbers of pixels, or
    would have no effect.
    """
    if not text:
        return FUYU_LIMIT
    if tiling != "patches":
        raise ValueError(f"--image_limit {text}: goes with --tiling patches; leave it out")
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(
            f"--image_limit {text}: must be width and height in pixels, such as 1920x1080"
        )
    return int(found[1]), int(found[2])


def _of_dynamic_tiling(args: argparse.Namespace) -> dict[str, int | bool]:
    """Return the given settings of dynamic tiling. Raises ValueError: they would have no effect."""
    asked = {"min_tiles": args.min_tiles, "max_tiles": args.max_tiles}
    given: dict[str, int | bool] = {
        name: value for name, value in asked.items() if value is not None
    }
    flags = [f"--{name} {value}" for name, value in given.items()]
    if not args.thumbnail:
        given["thumbnail"] = False
        flags.append("--no_thumbnail")
    if flags and args.tiling != "dynamic":
        raise ValueError(f"{', '.join(flags)}: goes with --tiling dynamic; leave it out")
    return given


def _pixels(args: argparse.Namespace, stated: StatedTiles, family: str) -> dict[str, int]:
    """Return the bounds of the pixels of an image that are given or stated, or usual for vision
    encoders of a family.

    Raises:
        ValueError: those that are given would have no effect, or one contradicts what is not given.
    """
    asked = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    given = {name: value for name, value in asked.items() if value is not None}
    if args.tiling == "native":
        usual = QWEN3_VL_PIXELS if family == "qwen3_vl" else QWEN2_VL_PIXELS
        others = dict(zip(asked, stated.pixels or usual, strict=True))
        bounds = others | given
        if len(given) == 1 and bounds["min_pixels"] > bounds["max_pixels"]:
            [name] = given
            [other] = others.keys() - given
            by = stated.file if stated.pixels else "default"
            raise ValueError(
                f"--{name} {given[name]}: --{other} is {bounds[other]} by {by}, and must be 1 <="
                f" min <= max; give --{other} too"
            )
        return bounds
    if given:
        flags = ", ".join(f"--{name} {value}" for name, value in given.items())
        raise ValueError(f"{flags}: goes with --tiling native; leave it out")
    return {}


def _video_pixels(args: argparse.Namespace, stated: StatedTiles, vision: Vision) -> VideoPixels:
    """Return the bounds of the frames of videos that are given, that the model's folder states, or
    that are usual for a vision encoder. Raises ValueError: those that are given would have no
    effect.
    """
    names = {"video_min_pixels": "least", "video_max_pixels": "most", "video_total_pixels": "total"}
    asked = vars(args)
    given = {name: asked[name] for name in names if asked[name] is not None}
    if args.tiling != "native":
        if given:
            flags = ", ".join(f"--{name} {value}" for name, value in given.items())
            raise ValueError(f"{flags}: goes with --tiling native; leave it out")
        return UNBOUNDED
    usual = usual_video_pixels(vision.image_size, args.capacity)
    if vision.family == "qwen3_vl":
        # Its processor bounds all frames of a video together.
        usual = dataclasses.replace(usual, least=vision.image_size**2)
    if stated.video != UNBOUNDED:  # a pack may be too short for as much
        usual = dataclasses.replace(stated.video, total=min(stated.video.total, usual.total))
    return dataclasses.replace(usual, **{names[name]: value for name, value in given.items()})


def _frame_choice(args: argparse.Namespace) -> FrameChoice:
    """Return how frames of videos are chosen: as the authors of Qwen2-VL do if they are read in
    pairs.
    """
    given = {"min_frames": args.min_frames, "max_frames": args.max_frames}
    given["sampling"] = args.frame_sampling or None
    usual: dict[str, Any] = {}
    if args.tiling == "native":
        usual = dict(min_frames=4, max_frames=768, multiple=PAIR, sampling="fps2")
    return FrameChoice(**usual | {name: one for name, one in given.items() if one is not None})


def _grids(text: str, tiling: str) -> tuple[Grid, ...]:
    """Read the grids that images may have; none if nothing is said. Raises ValueError: they are
    none, or would have no effect.
    """
    if not text:
        return ()
    if tiling not in USUAL_GRIDS:
        raise ValueError(
            f"--grids {text}: goes with --tiling {' or '.join(USUAL_GRIDS)}; leave it out"
        )
    return read_grids(text)


def _with_sizes(model: Architecture, args: argparse.Namespace) -> Architecture:
    """Return the model with tiles and patches of other sizes, if any are given.

    Raises:
        ValueError: the sizes do not go together.
    """
    given = {"image_size": args.image_size, "patch_size": args.patch_size}
    changed = {name: size for name, size in given.items() if size is not None}
    vision = dataclasses.replace(model.vision, **changed)
    where = f"--image_size {vision.image_size}, --patch_size {vision.patch_size}"
    if min(vision.image_size, vision.patch_size) < 1:
        raise ValueError(f"{where}: must be 1 or more")
    if not vision.fills_tile:
        raise ValueError(f"{where}: the first must be a multiple of the second")
    changed_model = dataclasses.replace(model, vision=vision)
    problems = list(changed_model.connector_sizes.problems())
    form = chat_format(args.template)
    # Neither has as many placeholder tokens as the connector decides.
    if problems and not form.is_of_pairs and not form.images.is_single:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return changed_model


def _tokens_per_tile(model: Architecture, given: int | None, template: str) -> int:
    """Return the placeholder tokens of a tile. Raises ValueError for numbers that cannot be."""
    form = chat_format(template)
    if form.is_of_pairs:
        return given or 0
    if form.images.is_single:
        if given not in (None, 1):
            raise ValueError(
                f"--tokens_per_tile {given}: an image of --template {template} has one placeholder"
                " token; use 1, or leave it out"
            )
        return 1
    tokens = model.placeholders_per_tile if given is None else given
    if tokens < 1:
        raise ValueError(f"--tokens_per_tile {tokens}: must be 1 or more")
    return tokens
