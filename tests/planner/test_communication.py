"""What ranks send that options change, as estimated."""

from __future__ import annotations

import dataclasses

from megavlm.planner.communication import communication_per_step
from megavlm.planner.layout import make_layout
from tests.planner.test_estimate import SIZE, run


def test_muon_sends_matrices_to_one_rank_and_back() -> None:
    config = run("1")
    language = config.architecture.language.hidden_size
    vision = config.architecture.vision.hidden_size
    elements = 4 * vision * language + language**2
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=2)
    optimizer = dataclasses.replace(config.optimizer, kind="muon")
    plain = dataclasses.replace(config, parallel=parallel)
    muon = dataclasses.replace(plain, optimizer=optimizer)
    layout = make_layout(plain, SIZE)
    last = len(layout.chunks) - 1
    rank = next(rank for rank in range(last + 1) if layout.chunks[rank].has_connector)
    without, sent = (communication_per_step(one, layout, rank, 4) for one in (plain, muon))
    # Of 2 tensor-parallel and 4 data-parallel ranks each has an eighth of the momentum, keeps a
    # quarter of that, and gets as much of updates to send; float32.
    eighth = 4 * elements / 8
    assert sent.data - without.data == 2 * eighth * 3 / 4
    assert sent.tensor - without.tensor == eighth
    assert (sent.pipeline, sent.context) == (without.pipeline, without.context)
