"""Checks of the settings of long runs."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.checks.limits import at_least
from megavlm.config.long_runs import BadSteps, Profile


def bad_steps_problems(bad: BadSteps) -> Iterator[str]:
    """Name the rules for bad steps that cannot be used."""
    yield from at_least(2, "bad_steps", bad, "window")
    yield from at_least(1, "bad_steps", bad, "most_in_a_row", "most")
    if bad.spike_factor and not 1 < bad.spike_factor < float("inf"):
        yield (
            f"--bad_steps.spike_factor {bad.spike_factor}: must be above 1, such as 3, or 0 to look"
            " for no spikes"
        )


def profile_problems(profile: Profile, steps: int, world_size: int) -> Iterator[str]:
    """Name the settings of a profile that cannot be used.

    Args:
        profile: the settings.
        steps: of the run.
        world_size: ranks of the run.
    """
    yield from at_least(1, "profile", profile, "first_step", "step_count")
    if not profile.folder:
        return
    last = profile.first_step + profile.step_count - 1
    if last > steps:
        yield (
            f"--profile.first_step {profile.first_step} and --profile.step_count"
            f" {profile.step_count}: the run ends after step {steps}, before step {last}"
        )
    for rank in profile.ranks:
        if not 0 <= rank < world_size:
            yield f"--profile.ranks {rank}: must be from 0 to {world_size - 1}"
