"""The gradients and weights that ``planner/communication`` predicts that data-parallel ranks send,
against what they really send.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Architecture, Config
from megavlm.planner.communication import synchronised_per_step
from megavlm.planner.layout import make_layout
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, make_packs
from tests.ranks.test_communication import CONTEXT, MIXTURE, SPREAD

# Where the whole tensors stand among the arguments.
_OPERATIONS = {"reduce_scatter_tensor_coalesced_": 1, "allgather_into_tensor_coalesced_": 0}


def synchronised(config: Config) -> tuple[float, float]:
    """Run a step; return the bytes of gradients and of weights that this rank sends."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import train_step

    job = build(config)
    batch = job.train.batch(job.groups.data_rank, 0, job.training_options)
    found = dict.fromkeys(_OPERATIONS, 0.0)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func._schema.name.removeprefix("c10d::")
            if name in _OPERATIONS:
                scripted = [one for one in args if isinstance(one, torch.ScriptObject)]
                size = dist.ProcessGroup.unbox(scripted[0]).size()
                whole = sum(tensor.nbytes for tensor in args[_OPERATIONS[name]])
                found[name] += (size - 1) / size * whole
            return func(*args, **(kwargs or {}))

    with Count():
        packs = Microbatches(iter([batch]), 1, batch.weight_sum)
        train_step(job, packs, 1.0, job.backend)
    gradients, weights = found.values()
    return gradients, weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=3, image_share=1.0, alignment=4)
    return folder


BEHIND = dict(overlap_param_gather=False)
CASES: list[tuple[str, Architecture, dict[str, Any]]] = [
    ("float32", TINY, {}),
    ("bfloat16", TINY, dict(precision="bfloat16")),
    ("frozen language", TINY, dict(trainable=("vision", "connector"))),
    ("context", TINY, CONTEXT),
    ("experts", MIXTURE, SPREAD),
    ("experts behind the update", MIXTURE, SPREAD | BEHIND),
    ("behind the update", MIXTURE, BEHIND),
]


@pytest.mark.parametrize(
    ("name", "model", "settings"),
    [
        pytest.param(*case, id=case[0])
        for case in CASES
        if asks_for_all() or case[0] in ("bfloat16", "experts behind the update")
    ],
)
def test_gradients_and_weights_are_what_ranks_send(
    ranks: Pool, dataset: Path, name: str, model: Architecture, settings: dict[str, Any]
):
    config = dataclasses.replace(
        config_for(dataset, overlap_grad_reduce=False, global_batch_size=2, **settings),
        architecture=model,
    )
    data_ranks = 2 // config.parallel.model_parallel_size
    told = synchronised_per_step(config, make_layout(config), 0, data_ranks)
    for found in ranks.run(synchronised, 2, config):
        # Each tensor is filled up to a multiple of 64 numbers.
        assert found == pytest.approx(told, rel=0.04) and min(found) > min(told)
