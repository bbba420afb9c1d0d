"""Judge one layout, and say what it asks of the packs."""

from __future__ import annotations

from megavlm.config.checks.rank_slices import capacity_problems
from megavlm.config.checks.rules import layout_problems
from megavlm.config.schema import Config, Parallel
from megavlm.planner.estimate import Estimate, Hardware, Packs, estimate


def judge(config: Config, gpus: int, packs: Packs, hardware: Hardware) -> Estimate:
    """Estimate the layout of a run.

    Raises:
        ValueError: it cannot run; every problem names the flag to change.
    """
    where = "--capacity" if packs.alignment is None else "--data"
    sharing = capacity_problems(config.parallel, where, packs.capacity)
    if wrong := [*layout_problems(config, gpus), *sharing]:
        listed = "\n  ".join(wrong)
        raise ValueError(f"--layout cannot run on --gpus {gpus}:\n  {listed}")
    return estimate(config, gpus, packs, hardware)


def alignment_note(parallel: Parallel, alignment: int | None) -> str:
    """Say how the packs must be aligned for context parallelism; nothing if they are, or without
    it.

    Args:
        parallel: the layout.
        alignment: of the packs; None: they are not made yet.
    """
    context = parallel.context_parallel_size
    needed = 2 * context
    if context == 1 or (alignment is not None and alignment % needed == 0):
        return ""
    again = "" if alignment is None else f"; those of --data have {alignment}: pack them again"
    return (
        f"packs for --parallel.context_parallel_size {context} are made with"
        f" tools/pack_dataset.py --alignment {needed}{again}"
    )
