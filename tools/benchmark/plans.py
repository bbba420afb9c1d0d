"""Tabulate what tools/plan_parallel.py proposes for models of several sizes on several numbers of
GPUs. These are the planner's predictions; nothing is measured.

python tools/benchmark/plans.py --json docs/benchmarks/plans.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megavlm.planner import search
from megavlm.planner.estimate import Estimate
from tools.planning.options import make_parser, read_config, read_hardware, read_packs

STAGE = "2"
# A small model gains nothing from many GPUs: the global batch is a fixed number of packs.
ASKED = {
    "internvl2_5-1b": (8, 64),
    "internvl2_5-2b": (8, 64),
    "internvl2_5-8b": (8, 64, 256),
    "internvl2_5-26b": (8, 64, 256, 1024),
    "internvl2_5-38b": (64, 256, 1024),
    "internvl2_5-78b": (64, 256, 1024),
}
_COLUMNS = ("TP", "PP", "V", "CP", "DP", "vision", "recompute", "GiB", "step s", "tokens/s/GPU")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    parser.add_argument(
        "--models", nargs="+", choices=ASKED, default=list(ASKED), metavar="NAME", help="some only"
    )
    options = parser.parse_args(arguments)
    rows = [plan(model, gpus) for model in options.models for gpus in ASKED[model]]
    print("\n".join(to_markdown(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def plan(model: str, gpus: int) -> dict[str, Any]:
    """Return the fastest layout of the search, with the command that finds it."""
    words = ["--model", model, "--stage", STAGE, "--gpus", str(gpus)]
    options, others = make_parser("").parse_known_args(words)
    config = read_config(options, others)
    packs = read_packs(options, config)
    found = {"model": model, "gpus": gpus}
    found["command"] = " ".join(["python", "tools/plan_parallel.py", *words])
    try:
        first = search.find_layouts(config, gpus, packs, read_hardware(options))[0]
    except ValueError as error:
        return found | {"problem": str(error)}
    return found | {"layout": _layout(first), "flags": search.to_flags(first)}


def to_markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| model | GPUs | {' | '.join(_COLUMNS)} |"
    yield "|---" * (2 + len(_COLUMNS)) + "|"
    for row in rows:
        cells = (
            [row["layout"][name] for name in _COLUMNS]
            if "layout" in row
            else ["nothing fits", *[""] * (len(_COLUMNS) - 1)]
        )
        yield f"| {row['model']} | {row['gpus']} | {' | '.join(cells)} |"


def _layout(first: Estimate) -> dict[str, str]:
    """Return the cells of a layout."""
    parallel = first.parallel
    return {
        "TP": str(parallel.tensor_model_parallel_size),
        "PP": str(parallel.pipeline_model_parallel_size),
        "V": str(parallel.virtual_pipeline_model_parallel_size),
        "CP": str(parallel.context_parallel_size),
        "DP": str(first.data_ranks),
        "vision": parallel.vision if parallel.tensor_model_parallel_size > 1 else "",
        "recompute": parallel.recompute,
        "GiB": f"{first.memory_gib:.1f}",
        "step s": f"{first.step_ms / 1e3:.2f}",
        "tokens/s/GPU": f"{first.tokens_per_s:,.0f}",
    }


if __name__ == "__main__":
    sys.exit(main())
