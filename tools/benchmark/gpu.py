"""Measure training on this machine's GPU, and the same in transformers beside it. No network is
needed; eight minutes are enough.

Everything, the most telling cases first:
    python tools/benchmark/gpu.py --json docs/benchmarks/h200.json
The cases, with the FLOPs and the memory that are expected, and those that do not fit:
    python tools/benchmark/gpu.py --dry_run --memory_gib 78
Some of them:
    python tools/benchmark/gpu.py --cases 2b-stage2-bf16,4b
The same code with a model of a few weights, on a CPU too:
    python tools/benchmark/gpu.py --smoke

docs/performance.md says how figures are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone needs no installation

from megavlm.config.recipes import RECIPES
from tools.benchmark import report, runner
from tools.benchmark.cases import Case, all_cases, chosen, smoke_cases


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the rows there too, after each case")
    add(
        "--cases",
        default="",
        metavar="PATTERNS",
        help="only cases whose name holds one of these, commas between them; * and ? may be used",
    )
    add("--dry_run", action="store_true", help="list the cases instead of running them")
    add(
        "--smoke",
        action="store_true",
        help="a tiny model and small packs: tries the benchmark, measures nothing of use",
    )
    add(
        "--time_limit_s",
        type=float,
        default=470,
        metavar="N",
        help="for everything; cases that are not reached say so (default: %(default)s)",
    )
    add(
        "--steps_s",
        type=float,
        default=9,
        metavar="N",
        help="for the warm-up and for the timed steps of a case (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=min(8, (os.cpu_count() or 2) // 2),
        metavar="N",
        help="loader processes (default: %(default)s)",
    )
    add("--capacity", type=int, metavar="N", help="tokens of a pack (default: 16384)")
    add("--tile_cap", type=int, metavar="N", help="most tiles of a pack (default: 48)")
    add(
        "--memory_gib",
        type=float,
        metavar="X",
        help="memory of the GPU; cases that need more are not run (default: this machine's)",
    )
    add(
        "--peak_tflops",
        type=float,
        default=989,
        metavar="X",
        help="of the device: dense bfloat16 (default: %(default)s, H100 and H200)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; 0 where a case was measured, 1 where none was, 2 for a command line that asks
    for nothing.
    """
    args = parse(arguments)
    began = time.monotonic()
    try:
        cases = chosen(smoke_cases() if args.smoke else all_cases(), args.cases)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.dry_run and (args.capacity or args.tile_cap):
        print("error: --dry_run: expects packs of the default --capacity", file=sys.stderr)
        return 2
    if args.dry_run:
        print(report.plan(cases, args.memory_gib))
        return 0
    rows = measure_all(cases, args, began)
    print(
        f"\n{report.header()}\n"
        + "\n".join(map(report.line, rows))
        + f"\n\n{report.comparisons(rows)}"
    )
    return 0 if any(not row["error"] for row in rows) else 1


def measure_all(cases: list[Case], args: argparse.Namespace, began: float) -> list[dict]:
    """Measure cases, print and write each row as soon as it is there, and return all.

    Args:
        cases: what is measured.
        args: the command line.
        began: when, as ``time.monotonic`` tells.
    """
    # Only now: --dry_run needs no tokenizer and no torch.
    from tools.benchmark.packs import REAL, SMOKE, make_packs

    sizes = SMOKE if args.smoke else REAL
    sizes = dataclasses.replace(
        sizes,
        capacity=args.capacity or sizes.capacity,
        tile_cap=args.tile_cap or sizes.tile_cap,
    )
    settings = runner.Settings(
        packs=sizes.packs,
        workers=args.workers,
        steps_s=args.steps_s,
        peak_tflops=args.peak_tflops,
        memory_gib=args.memory_gib or (None if args.smoke else runner.device_memory_gib()),
    )
    rows = []
    where = runner.facts()
    print(json.dumps(where), flush=True)
    with tempfile.TemporaryDirectory(prefix="megavlm-benchmark-") as folder:
        packs: dict[str, Path] = {}
        for case in cases:
            if case.packs not in packs:
                place = Path(folder) / case.packs
                (template, *_) = RECIPES[case.recipe].template
                made = make_packs(place, case.architecture, sizes, template=template)
                packs[case.packs] = Path(made.folder)
                print(f"{case.packs}: {made.manifest.totals}")
        print(f"{time.monotonic() - began:.1f} s to make\n{report.header()}", flush=True)
        for row in runner.run_all(cases, packs, Path(folder), settings, began + args.time_limit_s):
            rows.append(row | where)
            print("\n".join(filter(None, (report.line(row), report.kernels(row)))), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the case that runs is ended too
    sys.exit(main())
