"""What frozen parts save: a step of every stage in one process, against what the cost model
promises.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from megavlm.planner.layout import make_layout
from megavlm.planner.partition import PackSize, layer_costs
from tools.benchmark.cases import ALL
from tools.benchmark.scaled import STAGE_NAMES, Scale, config

RANKS = 1


def measure(scale: Scale, packs: Path) -> dict[str, dict[str, object]]:
    """Time steps of all stages in alternation, on one rank.

    Returns:
        By stage: FLOPs of a pack, and by round the seconds of a whole step, and of forward and
            backward pass alone.
    """
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.parallel import backend, process_groups
    from tools.benchmark.packs import fullest
    from tools.benchmark.ranks import Run

    dataset = PackedDataset(packs)
    size = PackSize.mean(dataset.index[fullest(dataset, scale.packs_per_step)])
    plain = config(scale, STAGE_NAMES[0], packs)
    device_backend = backend.start(plain.parallel.timeout_minutes)
    groups = process_groups.create(plain.parallel, 0)
    settings = {stage: config(scale, stage, packs) for stage in STAGE_NAMES}
    runs = {
        stage: Run(one, make_layout(one), groups, device_backend, packs)
        for stage, one in settings.items()
    }
    steps: dict[str, list[float]] = {stage: [] for stage in STAGE_NAMES}
    passes: dict[str, list[float]] = {stage: [] for stage in STAGE_NAMES}
    for _ in range(scale.rounds + 1):
        for stage, run in runs.items():
            steps[stage].append(run.step())
            passes[stage].append(run.forward_and_backward())
    return {
        stage: {
            "flops": sum(layer_costs(one.architecture, one.training.trainable, size)),
            "step_s": steps[stage][1:],
            "passes_s": passes[stage][1:],
        }
        for stage, one in settings.items()
    }


def summary(found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """By stage: what it saves of the time of the stage that trains everything, what its FLOPs
    promise, and the share of that promise.

    The share is told for forward and backward pass, which the FLOPs are of, and for whole steps,
    with the optimizer's own work.
    """
    told = {}
    whole = found[ALL]
    for stage, one in found.items():
        if stage == ALL:
            continue
        promised = 1 - one["flops"] / whole["flops"]
        saved = {
            name: statistics.median(
                1 - few / all_ for few, all_ in zip(one[name], whole[name], strict=True)
            )
            for name in ("passes_s", "step_s")
        }
        told[stage] = {
            "promised": promised,
            "saved": saved["passes_s"],
            "saved_of_step": saved["step_s"],
            "share": saved["passes_s"] / promised,
            "share_of_step": saved["step_s"] / promised,
        }
    return told
