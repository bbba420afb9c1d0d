"""The benchmark of the cost model, from end to end with a model of a few weights; no time is
judged.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.models import architecture
from megavlm.planner.flops import training_cost
from tests.ranks.pool import copying
from tools.benchmark import chunk_times, frozen, parallel, splits
from tools.benchmark.scaled import FULL, STAGE_NAMES


@pytest.mark.slow
def test_all_parts_run_and_their_figures_fit_together(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "deep" / "parallel.json"
    with copying():
        assert parallel.main(["--smoke", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    rows = told["chunks"]["rows"]
    assert {row["stage"] for row in rows} == set(STAGE_NAMES) == set(told["splits"]["rows"])
    for row in rows:
        assert row["forward_s"] > 0 and row["forward_flops"] > 0
    # By stage and layout the chunks make the whole model: their FLOPs sum up to the same.
    sums: dict[str, set[int]] = {}
    for stage, layout in {(row["stage"], row["layout"]) for row in rows}:
        chosen = [row for row in rows if (row["stage"], row["layout"]) == (stage, layout)]
        assert [row["chunk"] for row in chosen] == list(range(layout.count("|") + 1))
        sums.setdefault(stage, set()).add(
            round(sum(row["forward_flops"] + row["backward_flops"] for row in chosen))
        )
    assert all(len(found) == 1 for found in sums.values())
    for stage in STAGE_NAMES:
        one = told["splits"]["rows"][stage]
        assert one["promised"] >= 1 and {len(times) for times in one["seconds"].values()} == {2}
        assert told["frozen"]["rows"][stage]["flops"] > 0
    printed = capfd.readouterr().out
    assert (
        "| stage | chunks | Spearman |" in printed
        and "times faster" in printed
        and "whole step" in printed
    )


def test_a_part_that_is_not_known_is_named(capsys: pytest.CaptureFixture[str]):
    assert parallel.main(["--parts", "chunks,speed"]) == 2
    assert "--parts speed: known are chunks, splits, frozen" in capsys.readouterr().err


def test_ranks_are_correlated_as_by_hand():
    assert chunk_times.spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 21])) == pytest.approx(1)
    assert chunk_times.spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # Two equal ones share 1.5: covariance 1.5, variances 1.5 and 2.
    assert chunk_times.spearman(np.array([5.0, 5, 9]), np.array([1.0, 2, 3])) == pytest.approx(
        1.5 / (1.5 * 2) ** 0.5
    )


def test_a_cost_model_that_is_right_has_no_error():
    rows = [
        dict(
            stage=stage,
            forward_flops=1e9 * work,
            backward_flops=2e9 * work,
            forward_s=0.1 * work,
            backward_s=0.2 * work,
        )
        for stage in STAGE_NAMES
        for work in (1, 2, 5)
    ]
    for one in chunk_times.summary(rows).values():
        assert (
            one["spearman"] == pytest.approx(1)
            and one["worst_error"] == pytest.approx(0, abs=1e-9)
            and one["chunks"] == 3
        )


def test_pairs_are_compared_not_rounds():
    """A machine that is slow for a round is slow for both layouts."""
    seconds = {"auto": [1.0, 10.0, 1.0], "even": [1.5, 15.0, 1.5]}
    [told] = splits.summary({"2": {"seconds": seconds, "promised": 1.6}}).values()
    assert told["times_faster"] == pytest.approx(1.5)


def test_a_saving_is_a_share_of_what_was_promised():
    times = {
        name: {"flops": flops, "passes_s": [flops], "step_s": [flops + 1.0]}
        for name, flops in zip(STAGE_NAMES, (4.0, 6.0, 8.0))
    }
    told = frozen.summary(times)
    assert told[STAGE_NAMES[0]]["share"] == 1 and told[STAGE_NAMES[0]][
        "share_of_step"
    ] == pytest.approx(4 / 9 / 0.5)
    assert STAGE_NAMES[-1] not in told


def test_the_scaled_model_has_the_proportions_of_the_large_one():
    """Vision, connector, language model and head have the same shares of a step, within a few
    hundredths.
    """
    large = architecture("internvl2_5-78b")
    packs = FULL.packs
    trained = ("vision", "connector", "language")
    there = training_cost(large, trained).by_part(
        tokens=16384.0, squared_lengths=16384 * 2000.0, tiles=50.0
    )
    tiles = 0.78 * packs.capacity / FULL.architecture.features_per_tile
    here = training_cost(FULL.architecture, trained).by_part(
        tokens=packs.capacity, squared_lengths=packs.capacity**2 * 2000 / 16384, tiles=tiles
    )
    for part, flops in there.items():
        assert here[part] / sum(here.values()) == pytest.approx(
            flops / sum(there.values()), abs=0.03
        ), part
