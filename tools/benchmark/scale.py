"""Measure what grows with the number of ranks and with the amount of data, on one machine without a
GPU: nothing is trained. Times are of one processor, but ``comparing_s``, which is of the clock.

- ``start``: threads that stand for ranks compare a run's facts through a real TCPStore.
- ``reports``, ``process_groups``, ``saving``, ``checkpoint_folder``: what one rank does.
- ``loading``: what data-parallel ranks read of a checkpoint, computed.
- ``blend``, ``index``, ``manifest``, ``shuffling``: opening packs, and looking up those of a step.
- ``packing``, ``annotation_files``: the packer's plan.
- ``planner``: the search for a layout.

    python tools/benchmark/scale.py --json docs/benchmarks/scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megavlm.io import open_files
from tools.benchmark import scale_data, scale_ranks
from tools.benchmark.runner import facts

PARTS = ("ranks", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = "(default: %(default)s)"
    numbers: dict[str, Any] = dict(type=int, nargs="+", metavar="N")
    ranks = [8, 64, 256, 1024]
    parser.add_argument("--ranks", **numbers, default=ranks, help=f"numbers of ranks {shown}")
    samples = [10**5, 10**6, 10**7]
    parser.add_argument("--samples", **numbers, default=samples, help=f"samples to pack {shown}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some only")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where files may lie meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plan_here", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.plan_here:
        scale_data.plan_here(options.plan_here)
        return 0
    open_files.allow_many()
    tables: dict[str, Any] = facts()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        parts = {
            "ranks": lambda: scale_ranks.measure(options.ranks, Path(folder)),
            "data": lambda: scale_data.measure(options.ranks, options.samples, Path(folder)),
        }
        for part in options.parts:
            for name, row in parts[part]():
                print(name, json.dumps(row), flush=True)
                tables.setdefault(name, []).append(row)
    tables["load_average"] = os.getloadavg()[0]
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
