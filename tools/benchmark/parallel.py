"""Compare the cost model with measured times of model chunks, of pipelines with automatic and even
borders, and of stages with frozen parts. Two cores, no GPU, about three minutes:

    python tools/benchmark/parallel.py --json docs/benchmarks/parallel.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone needs no installation

from tools.benchmark import chunk_times, frozen, runner, splits
from tools.benchmark.ranks import on_ranks
from tools.benchmark.scaled import FULL, SMOKE

PARTS = {"chunks": chunk_times, "splits": splits, "frozen": frozen}


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; 0 where all was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="what to measure, with commas between (default: %(default)s)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a model of a few weights and two rounds, to try the benchmark itself",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        print(
            f"error: --parts {','.join(sorted(unknown))}: known are {', '.join(PARTS)}",
            file=sys.stderr,
        )
        return 2
    # Each rank gets a core; more threads would only take turns.
    os.environ["OMP_NUM_THREADS"] = "1"
    from tools.benchmark.packs import make_packs

    scale = SMOKE if args.smoke else FULL
    results = {"facts": runner.facts()}
    with tempfile.TemporaryDirectory(prefix="megavlm-benchmark-") as folder:
        packs = make_packs(Path(folder) / "data", scale.architecture, scale.packs).folder
        for part in (part for part in PARTS if part in parts):
            found = on_ranks(PARTS[part].measure, PARTS[part].RANKS, scale, packs)[0]
            results[part] = {"summary": PARTS[part].summary(found), "rows": found}
    results["seconds"] = round(time.monotonic() - began, 1)
    print(to_text(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def to_text(results: dict) -> str:
    """Write the figures as Markdown tables."""
    lines = []
    if "chunks" in results:
        lines += [
            "Chunks alone, time against FLOPs at one rate:\n",
            "| stage | chunks | Spearman | median error | worst error |",
        ]
        lines += ["|---|---|---|---|---|"]
        for stage, one in results["chunks"]["summary"].items():
            cells = (
                f"{one['chunks']} | {one['spearman']:.3f} | {one['median_error']:.1%} |"
                f" {one['worst_error']:.1%}"
            )
            lines.append(f"| {stage} | {cells} |")
    if "splits" in results:
        lines += ["\nTwo ranks, automatic against even stage boundaries:\n"]
        lines += [
            "| stage | automatic | even | automatic s | even s | times faster"
            " | predicted from FLOPs |",
            "|---|---|---|---|---|---|---|",
        ]
        for stage, one in results["splits"]["summary"].items():
            auto, even = (
                f"`{results['splits']['rows'][stage]['layouts'][name]}`".replace("|", "\\|")
                for name in splits.LAYOUTS
            )
            cells = (
                f"{one['auto_s']:.3f} | {one['even_s']:.3f} | {one['times_faster']:.2f} |"
                f" {one['promised']:.2f}"
            )
            lines.append(f"| {stage} | {auto} | {even} | {cells} |")
    if "frozen" in results:
        lines += ["\nSaved of the time of a step that trains everything:\n"]
        lines += [
            "| stage | predicted from FLOPs | forward and backward | share | whole step | share |",
            "|---|---|---|---|---|---|",
        ]
        for stage, one in results["frozen"]["summary"].items():
            cells = (
                f"{one['promised']:.1%} | {one['saved']:.1%} | {one['share']:.0%} |"
                f" {one['saved_of_step']:.1%} | {one['share_of_step']:.0%}"
            )
            lines.append(f"| {stage} | {cells} |")
    return "\n".join([*lines, f"\n{results['seconds']} s"])


if __name__ == "__main__":
    sys.exit(main())
