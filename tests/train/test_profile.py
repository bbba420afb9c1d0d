"""What a run says of its traces."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.schema import Profile
from megavlm.train.metrics import Metrics
from megavlm.train.profile import ProfiledSteps
from tests.ranks.runs import config_for


@pytest.mark.parametrize(
    ("folder", "ranks", "told"),
    [
        ("traces", (), ["profile: traces of steps 1 to 1 are in {}", "", ""]),
        ("traces", (1, 2), ["", "profile: traces of steps 1 to 1 are in {}", ""]),
        (
            "file/traces",
            (0, 2),
            [
                "ERROR: --profile.folder {}: no trace of rank 0 (",
                "",
                "ERROR: --profile.folder {}: no trace of rank 2 (",
            ],
        ),
    ],
)
def test_traces_are_told_once_and_each_rank_without_one_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    folder: str,
    ranks: tuple[int, ...],
    told: list[str],
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / folder
    settings = Profile(folder=str(place), first_step=1, step_count=1, ranks=ranks)
    for rank, words in enumerate(told):
        metrics = Metrics(config_for(tmp_path), is_writer=False)  # as with pipeline parallelism
        with ProfiledSteps(settings, rank, metrics, 0) as profiled:
            profiled.enter_step(1)
            profiled.enter_step(2)
        shown = capsys.readouterr().out
        assert bool(shown) == bool(words) and shown.startswith(words.format(place)), shown
