"""Rules for bad steps and profiles that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks.long_runs import bad_steps_problems, profile_problems
from megavlm.config.checks.rules import problems
from megavlm.config.schema import BadSteps, Profile
from tests.config.checks.configs import tiny


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(spike_factor=0.5), "--bad_steps.spike_factor 0.5: must be above 1"),
        (dict(spike_factor=float("nan")), "--bad_steps.spike_factor nan: must be above 1"),
        (dict(spike_factor=2.0, window=1), "--bad_steps.window 1: must be 2 or more"),
        (dict(skip=True, most=0), "--bad_steps.most 0: must be 1 or more"),
    ],
)
def test_rules_that_cannot_be_are_named(settings: dict, told: str) -> None:
    [problem] = bad_steps_problems(BadSteps(**settings))
    assert problem.startswith(told)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(skip=True, most=9, most_in_a_row=2),
        dict(spike_factor=3.0, window=8, spike_action="skip", most=9),
    ],
)
def test_good_rules_are_accepted(settings: dict) -> None:
    assert not list(bad_steps_problems(BadSteps(**settings)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(folder="t", first_step=9), "--profile.first_step 9 and --profile.step_count 3"),
        (dict(folder="t", first_step=0), "--profile.first_step 0: must be 1 or more"),
        (dict(folder="t", first_step=1, ranks=(4,)), "--profile.ranks 4: must be from 0 to 3"),
    ],
)
def test_profiles_that_would_not_be_written_are_named(settings: dict, told: str) -> None:
    [problem] = profile_problems(Profile(**settings), steps=10, world_size=4)
    assert problem.startswith(told)
    assert not list(profile_problems(Profile(folder="t", first_step=8), steps=10, world_size=1))


@pytest.mark.parametrize(
    ("objective", "most", "told"),
    [
        ("next_token", 9, ""),
        ("next_token", -1, "must be 0 or more"),
        ("contrastive", 9, "--architecture.objective contrastive compares the pairs of all packs"),
        ("contrastive", 0, ""),
        ("qformer", 9, "--architecture.objective qformer compares"),
    ],
)
def test_a_limit_of_unreadable_packs_suits_losses_of_single_packs(
    tmp_path: Path, objective: str, most: int, told: str
) -> None:
    option = f"--data.max_unreadable_packs={most}"
    config = tiny(tmp_path, option, "--architecture.objective", objective)
    found = [one for one in problems(config, 1) if one.startswith("--data.max_unreadable")]
    assert len(found) == bool(told) and all(told in one for one in found), found
