"""Read the command line of ``tools/plan_parallel.py``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megavlm.config.checks.device import kernel_problems
from megavlm.config.checks.rules import settings_problems
from megavlm.config.cli import parse, where_given
from megavlm.config.option_types import new_file, new_picture
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config
from megavlm.data.store.reader import Reader
from megavlm.job_checks import with_parameter_problems
from megavlm.model_source import read_model, recipe_problems
from megavlm.planner.estimate import Hardware, Packs
from megavlm.planner.partition import TYPICAL_IMAGE, PackSize

_CAPACITY = 16384
# Beside --capacity.
_SIZES = {
    "tiles": (50.0, "tiles of a pack, on average"),
    "image_tiles": (
        float(TYPICAL_IMAGE),
        "tiles of an image or of two frames of a video, on average, which a vision encoder that"
        " sees all of them asks for",
    ),
    "supervised": (4096.0, "tokens of a pack that have a loss, on average"),
    "sample_tokens": (2000.0, "tokens of a sample, on average"),
}
_TOP = 12
_HARDWARE = {
    "tflops": "dense bfloat16 rate of a GPU, in TFLOP/s, as in its data sheet",
    "memory_gib": "memory of a GPU, in GiB",
    "node_gb_per_s": "bandwidth between GPUs of a node, each way, in GB/s",
    "network_gb_per_s": "bandwidth between nodes, each way, for each GPU, in GB/s",
    "gpus_per_node": "GPUs of a node",
    "efficiency": "fraction of --tflops that training reaches",
}
# What the numbers must be, a test of it that NaN and infinity fail, and the options.
_RANGES = {
    "at least 1": (
        lambda number: 1 <= number < math.inf,
        (
            "gpus",
            "global_batch_size",
            "top",
            "gpus_per_node",
            "capacity",
            "sample_tokens",
            "image_tiles",
        ),
    ),
    "0 or more": (lambda number: 0 <= number < math.inf, ("tiles", "supervised")),
    "above 0": (
        lambda number: 0 < number < math.inf,
        ("tflops", "memory_gib", "node_gb_per_s", "network_gb_per_s"),
    ),
    "above 0 and at most 1": (lambda number: 0 < number <= 1, ("efficiency",)),
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser; its defaults are InternVL's."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shown = "(default: %(default)s)"
    model = "model preset, such as internvl2_5-8b, or a Hugging Face folder"
    parser.add_argument("--model", default="", help=f"{model} (default: the recipe's own)")
    unset = Config(stage="", model="")
    parser.add_argument("--recipe", help=f"recipe (default: {unset.recipe})")
    parser.add_argument(
        "--stage", required=True, help="stage of the recipe, such as 2; sets the freeze mask"
    )
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs of the run")
    batch = "packs (microbatches) of a step (default: the stage's)"
    parser.add_argument("--global_batch_size", type=int, help=batch)
    moments = f"dtype of Adam's moments (default: {unset.optimizer.moments})"
    parser.add_argument("--moments", choices=["float32", "bfloat16"], help=moments)
    layout = "judge one layout instead of searching: its --parallel options, in quotes"
    parser.add_argument("--layout", metavar="OPTIONS", help=layout)
    _add_packs(parser, shown)
    for field in dataclasses.fields(Hardware):
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            help=f"{_HARDWARE[field.name]} {shown}",
        )
    parser.add_argument("--top", type=int, default=_TOP, help=f"layouts to show {shown}")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all layouts as JSON")
    parser.add_argument(
        "--picture",
        type=new_picture,
        metavar="FILE",
        help="draw the chunks of the layouts that are shown",
    )
    return parser


def _add_packs(parser: argparse.ArgumentParser, shown: str) -> None:
    """Add the options for the sizes of packs."""
    names = ("capacity", *_SIZES)
    data = f"packed dataset to read the sizes of packs from; instead of --{', --'.join(names)}"
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    capacity = f"tokens of a pack (default: the stage's, or {_CAPACITY})"
    parser.add_argument("--capacity", type=int, help=capacity)
    for name, (default, what) in _SIZES.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{what} {shown}"
        )


def unread(options: argparse.Namespace) -> Iterator[str]:
    """Yield the options that would have no effect beside others."""
    given = dict(capacity=options.capacity) if options.capacity else {}
    for name, size in (given | _given_sizes(options)).items():
        if options.data:
            yield f"--{name} {size:g} has no effect: --data says what packs hold; leave it out"
    if options.layout is not None and options.top != _TOP:
        yield f"--top {options.top} has no effect with --layout, which is one layout; leave it out"


def _given_sizes(options: argparse.Namespace) -> dict[str, float]:
    """Return the sizes that are given, beside the capacity."""
    return {
        name: vars(options)[name]
        for name, (usual, _) in _SIZES.items()
        if vars(options)[name] != usual
    }


def number_problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield the numbers that no plan can have."""
    for asked, (holds, names) in _RANGES.items():
        for name in names:
            number = vars(options)[name]
            if number is not None and not holds(number):
                shown = f"{number:g}" if isinstance(number, float) else number
                yield f"--{name} {shown}: must be {asked}"


def read_config(options: argparse.Namespace, others: Sequence[str]) -> Config:
    """Return the run that is planned, with the layout of ``--layout`` if there is one; wrong input
    ends the process as in ``parse``.

    A run that Transformer Engine's layers cannot compute has local ones, unless it asks for the
    others.

    Args:
        options: of the planner.
        others: those of ``pretrain_vlm.py``.

    Raises:
        ValueError: an option that the search sets, a file that cannot be read, or layers that
            cannot compute the run.
    """
    if options.layout is None and (wrong := list(_of_layout(others))):
        raise ValueError("\n  ".join(wrong))
    named = {
        "recipe": options.recipe,
        "stage": options.stage,
        "model": options.model,
        "optimizer.moments": options.moments,
        "training.global_batch_size": options.global_batch_size,
    }
    given = [word for name, value in named.items() if value for word in (f"--{name}", str(value))]
    config = parse([*given, *others, *shlex.split(options.layout or "")], read_model, _problems)
    wrong = list(kernel_problems(config))
    if config.training.kernels == "transformer_engine" and wrong:
        raise ValueError("\n  ".join(wrong))
    training = dataclasses.replace(config.training, kernels="local")
    return dataclasses.replace(config, training=training) if wrong else config


def _of_layout(others: Sequence[str]) -> Iterator[str]:
    """Yield the options of a layout, which the search sets itself."""
    for key, given in where_given(others).items():
        if key.startswith("parallel."):
            where = f" ({given.file})" if given.file else ""
            yield (
                f"--{key} {given.text}{where}: the search sets the layout; leave it out, or judge"
                " one layout with --layout"
            )


def _problems(config: Config, ranks: int) -> list[str]:
    """Return what is wrong with a run, whatever its data and layout."""
    found = [*recipe_problems(config), *settings_problems(config)]
    return with_parameter_problems(config, found)


def read_packs(options: argparse.Namespace, config: Config) -> Packs:
    """Return what a pack of a run holds on average.

    Raises:
        ValueError: a size above the capacity; or as ``Reader`` if ``--data`` is no dataset.
    """
    if not options.data:
        capacity = options.capacity or recipe(config.recipe).stage(config.stage).capacity
        capacity = capacity or _CAPACITY
        for name, size in _given_sizes(options).items():
            if name != "tiles" and size > capacity:
                raise ValueError(f"--{name} {size:g}: must be at most --capacity {capacity}")
        size = PackSize(
            tokens=capacity,
            squared_lengths=capacity * min(options.sample_tokens, capacity),
            tiles=options.tiles,
            squared_tiles=options.tiles * min(options.image_tiles, options.tiles),
            supervised=min(options.supervised, capacity),
        )
        return Packs(size=size, capacity=capacity)
    reader = Reader(options.data)
    size = PackSize.mean(reader.index[range(min(len(reader), 4096))])
    manifest = reader.manifest
    return Packs(size=size, capacity=manifest.capacity, alignment=manifest.alignment)


def read_hardware(options: argparse.Namespace) -> Hardware:
    """Return the GPUs."""
    names = [field.name for field in dataclasses.fields(Hardware)]
    return Hardware(**{name: vars(options)[name] for name in names})
