"""Find out how to lay a model out over GPUs: every layout that fits, with what it is expected to
need and take, the fastest first.

python tools/plan_parallel.py --model internvl2_5-78b --stage 2 --gpus 512 --memory_gib 80 python
tools/plan_parallel.py --model internvl2_5-8b --stage 1 --gpus 64 --data packs/train --picture
chunks.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from megavlm.config.cli import parse
from megavlm.data.store.reader import Reader
from megavlm.planner import search
from megavlm.planner.estimate import Hardware
from megavlm.planner.partition import PackSize
from megavlm.planner.report import draw, options_to_text, to_text

PACKS = {
    "capacity": (16384, "tokens of a pack"),
    "tiles": (50.0, "tiles of a pack, on average"),
    "supervised": (4096.0, "tokens of a pack that have a loss, on average"),
    "sample_tokens": (2000.0, "tokens of a sample, on average"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="row of the table of models")
    parser.add_argument("--stage", required=True, help="row of the table of stages")
    parser.add_argument("--gpus", type=int, required=True, help="how many there are")
    parser.add_argument(
        "--global_batch_size", type=int, help="packs of a step (default: the stage's)"
    )
    parser.add_argument(
        "--moments", choices=["float32", "bfloat16"], default="float32", help="of Adam"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"packed dataset that tells how large packs are; instead of --{', --'.join(PACKS)}",
    )
    for name, (default, what) in PACKS.items():
        text = f"{what} (default: {default:g})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    for field in dataclasses.fields(Hardware):
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            help="of the GPUs (default: %(default)s)",
        )
    parser.add_argument(
        "--top", type=int, default=12, help="layouts to show (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all layouts that fit as JSON"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the chunks of the layouts that are shown"
    )
    options = parser.parse_args(arguments)
    try:
        show(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show(options: argparse.Namespace) -> None:
    """Print, write and draw what was asked for; raises ValueError where no layout runs or fits."""
    batch = (
        ["--training.global_batch_size", str(options.global_batch_size)]
        if options.global_batch_size
        else []
    )
    config = parse(
        [
            "--stage",
            options.stage,
            "--model",
            options.model,
            "--optimizer.moments",
            options.moments,
            *batch,
        ]
    )
    hardware = Hardware(
        **{field.name: vars(options)[field.name] for field in dataclasses.fields(Hardware)}
    )
    case = (options.gpus, *packs(options), hardware)
    found = search.layouts(config, *case)
    shown = search.best_of_each(found)[: options.top]
    print(
        f"{options.model}, stage {options.stage}, {options.gpus} GPUs,"
        f" {config.training.global_batch_size} packs a step, each of {case[1]}"
    )
    print(
        f"{len(found)} layouts fit into nine tenths of {hardware.memory_gib:g}"
        f" GiB\n\n{to_text(shown)}\n"
    )
    print(
        "the first, with one option changed at a"
        f" time:\n{options_to_text(search.options(config, found[0], *case), hardware)}\n"
    )
    print(f"to use the first:\n{search.flags(found[0])}")
    if options.json:
        rows = [dataclasses.asdict(one) | {"memory_gib": one.memory_gib} for one in found]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(shown, options.picture)


def packs(options: argparse.Namespace) -> tuple[PackSize, int]:
    """What a pack holds on average, and its capacity."""
    if not options.data:
        mean = options.capacity * options.sample_tokens
        return (
            PackSize(
                tokens=options.capacity,
                squared_lengths=mean,
                tiles=options.tiles,
                supervised=min(options.supervised, options.capacity),
            ),
            options.capacity,
        )
    reader = Reader(options.data)
    return PackSize.mean(reader.index[range(min(len(reader), 4096))]), reader.manifest.capacity


if __name__ == "__main__":
    sys.exit(main())
