"""Step time with the automatic stage boundaries against those of equal numbers of layers:
two real ranks, every stage.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from megavlm.planner.layout import make_layout
from megavlm.planner.partition import PackSize
from tools.benchmark.scaled import STAGE_NAMES, Scale, config

RANKS = 2
LAYOUTS = ("auto", "even")


def measure(scale: Scale, packs: Path) -> dict[str, dict[str, object]]:
    """Time steps of both layouts in alternating pairs, so that other load on the machine affects
    both alike; runs on every rank.

    Returns:
        By stage: the layouts, their seconds by round, and what the cost model says that they cost,
            slowest chunk by slowest chunk.
    """
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.parallel import backend, process_groups
    from tools.benchmark.packs import fullest
    from tools.benchmark.ranks import Run

    dataset = PackedDataset(packs)
    size = PackSize.mean(dataset.index[fullest(dataset, scale.packs_per_step)])
    plain = config(scale, STAGE_NAMES[0], packs, chunks=RANKS)
    device_backend = backend.start(plain.parallel.timeout_minutes)
    groups = process_groups.create(plain.parallel, 0)
    found = {}
    for stage in STAGE_NAMES:
        settings = {
            name: config(scale, stage, packs, chunks=RANKS, layout=name) for name in LAYOUTS
        }
        made = {name: make_layout(settings[name], size) for name in LAYOUTS}
        runs = {
            name: Run(settings[name], made[name], groups, device_backend, packs) for name in LAYOUTS
        }
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for number in range(scale.rounds + 1):
            for name in LAYOUTS if number % 2 else reversed(LAYOUTS):
                seconds[name].append(runs[name].step())
        found[stage] = {
            "layouts": {name: str(layout) for name, layout in made.items()},
            "seconds": {name: times[1:] for name, times in seconds.items()},
            "promised": _slowest(settings["even"], made["even"], size)
            / _slowest(settings["auto"], made["auto"], size),
        }
    return found


def _slowest(settings, layout, size: PackSize) -> float:
    from tools.benchmark.chunk_times import flops

    return max(
        sum(flops(settings, layout, number, size).values()) for number in range(len(layout.chunks))
    )


def summary(found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """By stage: median seconds of a step with each layout, and how many times faster the automatic
    one is, by the median of the pairs.
    """
    told = {}
    for stage, one in found.items():
        seconds = one["seconds"]
        pairs = [even / auto for auto, even in zip(seconds["auto"], seconds["even"], strict=True)]
        told[stage] = {
            **{f"{name}_s": statistics.median(times) for name, times in seconds.items()},
            "times_faster": statistics.median(pairs),
            "promised": one["promised"],
        }
    return told
