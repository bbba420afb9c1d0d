"""Packs a million samples of an InternVL-like mix by several rules, on one core: fill, waiting for
the vision encoder, speed.

The mix: 62% records of one image (1 to 13 tiles), 13% of several images, 20% text alone, 5% video
(8 to 32 frames of one tile); 256 tokens a tile, text log-normal around 180 tokens. Speeds are of
processor time, the best of ``--repeats`` runs. Ten million samples are then packed by our rule in a
process of its own, whose peak memory is taken.

    python tools/benchmark/packing.py --json packing.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from megavlm.data.packing.best_fit import automatic_tile_cap, pack
from megavlm.data.packing.plan import Samples, plan_packs
from megavlm.data.packing.report import PackingFacts, make_report
from megavlm.data.packing.report_plot import draw_report
from tools.benchmark.figures import write_figures
from tools.benchmark.packing_baselines import Strategy, compare

CAPACITY = 16384
FEATURES_PER_TILE = 256
# Chance and number of tiles of records with one image.
ONE_IMAGE = ((1, 3, 5, 7, 9, 10, 11, 13), (0.12, 0.12, 0.16, 0.18, 0.10, 0.08, 0.08, 0.16))
BATCH = 512
KINDS = ("one image", "several images", "text alone", "video")
SHARES = (0.62, 0.13, 0.20, 0.05)


def mixed_kinds(count: int, seed: int = 0) -> np.ndarray:
    """Return which of ``KINDS`` each sample of ``mix`` is, int8 [count]."""
    chosen = np.random.default_rng(seed).choice(len(KINDS), size=count, p=SHARES)
    return chosen.astype(np.int8)


def mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of ``count`` samples, int32 [count] each."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(KINDS), size=count, p=SHARES).astype(np.int8)
    tiles = np.zeros(count, np.int32)
    one, several, video = (np.flatnonzero(kind == index) for index in (0, 1, 3))
    tiles[one] = rng.choice(ONE_IMAGE[0], size=len(one), p=ONE_IMAGE[1])
    tiles[several] = rng.integers(2, 6, size=len(several)) * rng.integers(1, 5, size=len(several))
    tiles[video] = rng.integers(8, 33, size=len(video))
    text = np.clip(rng.lognormal(5.2, 1.0, size=count), 16, 8000).astype(np.int32)
    return np.minimum(tiles * FEATURES_PER_TILE + text, CAPACITY), tiles


def peak(count: int) -> None:
    """Pack ``count`` samples by our rule in this process, and print seconds and peak memory as
    JSON.
    """
    tokens, tiles = mix(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack(tokens[:100], tiles[:100], capacity=CAPACITY, tile_cap=64)
    start = time.process_time()
    cap = automatic_tile_cap(tokens, tiles, CAPACITY)
    packing = pack(tokens, tiles, capacity=CAPACITY, tile_cap=cap)
    seconds = time.process_time() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fill = int(tokens.sum(dtype=np.int64)) / (packing.bins * CAPACITY)
    figures = {
        "samples": count,
        "seconds": seconds,
        "samples_per_s": count / seconds,
        "fill": fill,
        "tile_cap": cap,
    }
    print(
        json.dumps({**figures, "before_packing_mib": before / 1024, "peak_memory_mib": most / 1024})
    )


def draw(tokens: np.ndarray, tiles: np.ndarray, path: Path) -> None:
    """Draw the packer's report on the samples, as of a dry run that rejected nothing."""
    samples = Samples(rows=np.arange(len(tokens), dtype=np.int32), tokens=tokens, tiles=tiles)
    start = time.perf_counter()
    plan = plan_packs(samples, capacity=CAPACITY, tile_cap=None, seed=0)
    facts = PackingFacts(
        out="the mix of tools/benchmark/packing.py",
        records=len(tokens),
        packed_records=len(tokens),
        rejects={},
        capacity=CAPACITY,
        seed=0,
        seconds=time.perf_counter() - start,
    )
    draw_report(make_report(samples, plan, facts), path)


def best(runs: list[tuple[Strategy, ...]]) -> list[Strategy]:
    """Select the fastest run of each rule."""
    return [
        max(rule, key=lambda strategy: strategy.samples_per_s) for rule in zip(*runs, strict=True)
    ]


def parse() -> argparse.Namespace:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1_000_000,
        metavar="N",
        help="samples to pack (default: %(default)s)",
    )
    parser.add_argument(
        "--many",
        type=int,
        default=10_000_000,
        metavar="N",
        help="samples of the run for memory; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="runs, of which the fastest counts (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, an object for each rule"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the packer's report on these samples"
    )
    parser.add_argument("--peak", type=int, metavar="N", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.peak:
        peak(options.peak)
        return
    tokens, tiles = mix(options.samples)
    compare(tokens[:1000], tiles[:1000], CAPACITY)  # compiles
    found = best([compare(tokens, tiles, CAPACITY) for _ in range(options.repeats)])
    print(
        f"{len(tokens):,} samples of {tokens.mean():.0f} tokens and {tiles.mean():.2f} tiles on"
        f" average, capacity {CAPACITY:,}"
    )
    print(f"{'':18}{'fill':>9}{'imbalance of 512':>18}{'tile cap':>10}{'M samples/s':>13}")
    for rule in found:
        print(
            f"{rule.name:18}{rule.fill:9.3%}{rule.imbalance_512:18.2%}"
            f"{rule.tile_cap or '-':>10}{rule.samples_per_s / 1e6:13.2f}"
        )
    figures = {rule.name: dataclasses.asdict(rule) for rule in found}
    if options.picture:
        draw(tokens, tiles, options.picture)
    if options.many:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", str(options.many)],
            capture_output=True,
            text=True,
            check=True,
        )
        figures["many"] = json.loads(done.stdout)
        print(
            f"{options.many:,} samples: {figures['many']['seconds']:.1f} s, peak memory"
            f" {figures['many']['peak_memory_mib']:,.0f} MiB,"
            f" {figures['many']['before_packing_mib']:,.0f} MiB of them before packing"
        )
    if options.json:
        write_figures(options.json, figures, samples=len(tokens))


if __name__ == "__main__":
    main()
