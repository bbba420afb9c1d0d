"""The communication that ``planner/communication`` predicts against what ranks really send."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Architecture, Config, Experts
from megavlm.planner.activations import RankLoad
from megavlm.planner.communication import (
    communication_per_microbatch,
    communication_per_step,
)
from megavlm.planner.layout import make_layout
from tests.convert.models import EXPERTS
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, batch_options, build, config_for, make_packs

# In a ring of k ranks each sends (k - 1) / k of the elements of a whole tensor, once or twice. The
# first of the tensors is the result, the second what goes in.
_WHOLE_TENSORS = {
    "allreduce_": (2, 0),
    "_allgather_base_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
    "alltoall_base_": (1, 1),
}


def sent(config: Config) -> tuple[int, dict[str, float], int, int]:
    """Run one pack; return the pipeline rank, the bytes that this rank sends, and the tiles of the
    pack on this rank and its tokens without padding. Gradients of whole parameters are sums of
    replicas.
    """
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    batch = job.train.batch(0, 0, **batch_options(job))
    shapes = {parameter.shape for chunk in job.chunks for parameter in chunk.parameters()}
    found = {"collectives": 0.0, "pipeline": 0.0, "replicas": 0.0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func._schema.name.removeprefix("c10d::")
            if name == "send":
                found["pipeline"] += sum(tensor.nbytes for tensor in args[0])
            elif name in _WHOLE_TENSORS:
                scripted = [one for one in args if isinstance(one, torch.ScriptObject)]
                size = dist.ProcessGroup.unbox(scripted[0]).size()
                times, position = _WHOLE_TENSORS[name]
                whole = args[0][0] if name == "allreduce_" else args[position]
                kind = "collectives"
                if name == "allreduce_":
                    kind = "replicas" if whole.shape in shapes else kind
                    is_small = kind == "collectives" and whole.shape[1:].numel() == 1
                else:
                    is_small = whole.dtype == torch.int64
                if not is_small:  # those of the loss, counts of tokens, norms of the gradient
                    found[kind] += times * (size - 1) / size * whole.nbytes
            return func(*args, **(kwargs or {}))

    with Count():
        run_packs(job.ddp_chunks, Microbatches(iter([batch]), 1, batch.weight_sum), job.backend)
    return job.groups.pipeline_rank, found, len(batch.tiles), int(job.train.index[0]["tokens"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=3, image_share=1.0, alignment=4)
    return folder


SEQUENCE = dict(tensor_model_parallel_size=2, sequence_parallel=True)
MIXTURE = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, **EXPERTS | dict(num_experts=6))
)
SPREAD = dict(expert_model_parallel_size=2)
PIPELINE = dict(pipeline_model_parallel_size=2)
CASES: list[tuple[str, Architecture, dict[str, Any]]] = [
    ("tensor", TINY, dict(tensor_model_parallel_size=2)),
    ("sequence", TINY, SEQUENCE),
    ("selective", TINY, SEQUENCE | dict(recompute="selective")),
    ("full", TINY, SEQUENCE | dict(recompute="full")),
    ("full without sequence", TINY, dict(tensor_model_parallel_size=2, recompute="full")),
    ("vision data", TINY, SEQUENCE | dict(vision="data")),
    ("frozen", TINY, SEQUENCE | dict(trainable=("connector",))),
    ("context", TINY, dict(context_parallel_size=2)),
    ("context full", TINY, dict(context_parallel_size=2, recompute="full")),
    ("allgather", MIXTURE, SPREAD),
    ("alltoall", MIXTURE, SPREAD),
    ("alltoall selective", MIXTURE, SPREAD | dict(recompute="selective")),
    ("allgather full", MIXTURE, SPREAD | dict(recompute="full")),
    ("experts of tensor ranks", MIXTURE, SEQUENCE | SPREAD),
    ("alltoall shared", MIXTURE, SEQUENCE | dict(expert_tensor_parallel_size=2)),
    ("pipeline", TINY, PIPELINE | dict(layout="v*3,t|t*2")),
    ("pipeline of vision", TINY, PIPELINE | dict(layout="v*2|v,t*3")),
    ("pipeline frozen", TINY, PIPELINE | dict(layout="v*2|v,t*3", trainable=("connector",))),
    ("pipeline sequence", TINY, PIPELINE | SEQUENCE | dict(layout="v*3,t|t*2")),
]


@pytest.mark.parametrize(("name", "model", "settings"), CASES, ids=[case[0] for case in CASES])
def test_communication_is_what_ranks_send(
    ranks: Pool, dataset: Path, name: str, model: Architecture, settings: dict[str, Any]
):
    dispatcher = "alltoall" if name.startswith("alltoall") else "allgather"
    config = dataclasses.replace(
        config_for(dataset, head_tokens="all", overlap_grad_reduce=False, **settings),
        architecture=model,
        experts=Experts(dispatcher=dispatcher),
    )
    layout = make_layout(config)
    parallel = config.parallel
    world = max(parallel.model_parallel_size, parallel.expert_model_parallel_size)
    data_ranks = world // parallel.model_parallel_size
    padding = RankLoad.mean(parallel, 1, 1.0).tiles * parallel.tile_ranks - 1
    answers = ranks.run(sent, world, config)
    inside = [found["collectives"] for _, found, *_ in answers]
    told = []
    for rank, found, tiles, tokens in answers:
        every = tiles * parallel.tile_ranks - padding
        expected = communication_per_microbatch(config, layout, rank, 128, every)
        # Padding goes to no expert.
        share = tokens / 128 if dispatcher == "alltoall" else 1
        told.append(expected.tensor + expected.context + expected.expert * share)
        assert found["pipeline"] == pytest.approx(expected.pipeline)
        replicas = communication_per_step(config, layout, rank, data_ranks).tensor
        assert found["replicas"] == pytest.approx(replicas)
    if dispatcher == "alltoall":  # no two ranks' tokens go to as many experts elsewhere
        inside = [sum(inside)]
        told = [sum(told)]
    assert inside == pytest.approx(told)
