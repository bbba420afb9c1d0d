"""What the order of packs does to a step: how mixed its packs are, and how long ranks wait for each
other in attention.

Samples are those of ``tools/benchmark/packing.py``, packed by our rule, in steps of 512 packs. The
mixture is the share of a kind's tokens in each step. What ranks wait is how far the largest sum of
a step's attention FLOPs over a rank's packs is above the mean of the ranks.

    python tools/benchmark/pack_order.py --json pack_order.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from megavlm.data.loading.order import Plan
from megavlm.data.packing.best_fit import automatic_tile_cap, pack
from megavlm.data.packing.cost_order import storage_order
from tools.benchmark.figures import write_figures
from tools.benchmark.packing import BATCH, CAPACITY, KINDS, mix, mixed_kinds

ORDERS = {
    "--data.strata 16": {"group": BATCH // 16, "strata": 16},
    "--data.strata 8": {"group": BATCH // 8, "strata": 8},
    f"--data.strata 1 --data.group {BATCH // 8}": {"group": BATCH // 8},
    "--data.strata 1": {"group": BATCH},
    "--data.group 1": {},
}
"""What a run of 512 packs a step would say, and what the order is then."""
RANKS = (8, 16, 32, 64, 128, 256, 512)


def measure(samples: int) -> dict[str, dict[str, float]]:
    """Return the figures of each order."""
    tokens, tiles = mix(samples)
    kinds = mixed_kinds(samples)
    cap = automatic_tile_cap(tokens, tiles, CAPACITY)
    packing = pack(tokens, tiles, capacity=CAPACITY, tile_cap=cap)
    attention = np.bincount(packing.bin_of, weights=tokens.astype(np.float64) ** 2)
    stored = np.argsort(storage_order(attention, np.bincount(packing.bin_of, weights=tiles)))
    of_kinds = np.stack(
        [
            np.bincount(
                packing.bin_of, weights=np.where(kinds == kind, tokens, 0), minlength=packing.bins
            )
            for kind in range(len(KINDS))
        ]
    )
    found = {}
    for name, order in ORDERS.items():
        plan = Plan(num_packs=packing.bins, seed=1, **order)
        steps = stored[plan.pack_ids(0, packing.bins // BATCH * BATCH)].reshape(-1, BATCH)
        sums = of_kinds[:, steps].sum(axis=2)
        found[name] = figures_of_mixture(sums / sums.sum(axis=0)) | {
            f"attention_of_{ranks}_ranks": largest_over_mean(attention[steps], ranks)
            for ranks in RANKS
        }
    return found


def figures_of_mixture(shares: np.ndarray) -> dict[str, float]:
    """Return least, most and standard deviation of the share of each kind; ``shares`` is [kinds,
    steps].
    """
    found = {}
    for kind, share in zip(KINDS, shares, strict=True):
        found[f"least_{kind}"] = float(share.min())
        found[f"most_{kind}"] = float(share.max())
        found[f"spread_{kind}"] = float(share.std())
    return found


def largest_over_mean(costs: np.ndarray, ranks: int) -> float:
    """Return how far the largest sum of a rank is above the mean; ``costs`` is [steps, packs], of
    which rank r of n has ``[r::n]``.
    """
    sums = costs.reshape(len(costs), -1, ranks).sum(axis=1)
    return float(sums.max(axis=1).sum() / sums.mean(axis=1).sum()) - 1.0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="N", help="to pack")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = measure(options.samples)
    for name, figures in found.items():
        print(name)
        for kind in KINDS:
            least, most, spread = (
                figures[f"{what}_{kind}"] for what in ("least", "most", "spread")
            )
            print(f"  {kind:15}{least:7.1%} to {most:6.1%} of a step's tokens, spread {spread:.1%}")
        waits = [f"{ranks}: {figures[f'attention_of_{ranks}_ranks']:.1%}" for ranks in RANKS]
        print(f"  attention over the mean, by data-parallel ranks  {'  '.join(waits)}")
    if options.json:
        write_figures(options.json, found, samples=options.samples)


if __name__ == "__main__":
    main()
