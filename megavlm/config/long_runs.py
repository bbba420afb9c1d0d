"""Settings of long runs: steps that go wrong, and a profile of some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BadSteps:
    """What becomes of a step whose gradient is not finite, or whose loss is far above those before.

    A skipped step changes neither weights nor moments on any rank; its packs are consumed. Before
    each update the host then waits for the gradient norm, or for the loss.

    Args:
        skip: skip a step whose gradient norm is NaN or infinite, instead of ending the run.
        spike_factor: a loss of more than this many times the median of the last losses is a spike;
            0: no spike is looked for.
        spike_action: warn of a spike, or skip its step as well.
        window: losses of the last steps that the median is taken of; spikes are looked for as soon
            as there are half as many.
        most_in_a_row: end the run after so many skipped steps in a row.
        most: end the run after so many skipped steps in all.
    """

    skip: bool = False
    spike_factor: float = 0.0
    spike_action: Literal["warn", "skip"] = "warn"
    window: int = 64
    most_in_a_row: int = 5
    most: int = 100

    @property
    def is_watched(self) -> bool:
        """Whether the host looks at each step before its update."""
        return self.skip or self.spike_factor > 0

    @property
    def skips(self) -> bool:
        """Whether any step may be skipped."""
        return self.skip or (self.spike_factor > 0 and self.spike_action == "skip")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile of some steps by torch.profiler, one trace for each rank.

    Args:
        folder: folder for the traces, which Perfetto and chrome://tracing open; empty: no profile.
        first_step: first step that is profiled, counted from 1 as on the console.
        step_count: steps that are profiled.
        ranks: ranks that are profiled; empty: all.
        memory: also record each allocation of memory.
        memory_snapshot: folder for a snapshot of the GPU's memory, which each rank that runs out of
            memory writes for pytorch.org/memory_viz; empty: no snapshot.
    """

    folder: str = ""
    first_step: int = 10
    step_count: int = 3
    ranks: tuple[int, ...] = ()
    memory: bool = False
    memory_snapshot: str = ""

    def has_rank(self, rank: int) -> bool:
        """Return whether a rank is profiled."""
        return bool(self.folder) and (not self.ranks or rank in self.ranks)
