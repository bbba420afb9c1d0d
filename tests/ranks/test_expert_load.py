"""How busy experts are is reported alike at every layout, and counted anew after each report."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.pool import Pool
from tests.ranks.runs import build
from tests.ranks.test_experts import Layout, expert_config, routed
from tests.ranks.test_experts import dataset as dataset


def two_reports(config: Config) -> list[dict]:
    """Run the four packs of a step, and report twice."""
    from megavlm.train.expert_load import ExpertLoad
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    packs = range(job.groups.data_rank, 4, job.groups.data_size)
    batches = [job.train.batch(pack, 0, BatchOptions(vision_layers=2)) for pack in packs]
    run_packs(job.ddp_chunks, Microbatches(iter(batches), len(batches), 100.0), job.backend)
    load = ExpertLoad(job.chunks, config.architecture, job.backend.device)
    return [load.report(job.groups, 1), load.report(job.groups, 1)]


def test_reports_are_those_of_one_process(ranks: Pool, dataset: Path) -> None:
    [(_, _, loads, by_hand)] = ranks.run(routed, 1, expert_config(dataset))
    busiest = {str(layer): 8 * max(row[:8]) / sum(row[:8]) for layer, row in enumerate(loads)}
    assert all(1 < factor < 8 for factor in busiest.values())
    split = Layout(expert=2, pipeline=2, virtual=2, data=2)
    for layout in (Layout(), split):
        config = expert_config(dataset, **layout.settings)
        for first, second in ranks.run(two_reports, layout.ranks, config):
            assert first == {
                "expert_balance": pytest.approx(sum(by_hand) / (2 * 4), rel=1e-5),
                "expert_load": pytest.approx(busiest, rel=1e-9),
            }
            assert second == {}, "nothing was counted since the first report"
