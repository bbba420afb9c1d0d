"""The model of a run on this rank, ready to be trained: whoever trains builds it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megavlm.checkpoint.train_state import History
from megavlm.config.schema import Config
from megavlm.model import freeze, nf4_layers
from megavlm.model.freeze import Trained
from megavlm.model.lora import start_magnitudes
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Layout
from megavlm.train import stage_moments
from megavlm.train.optimizer import build_optimizer, wrap_chunks
from megavlm.train.part_norms import PartNorms
from megavlm.train.pipeline import set_schedule_hooks


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """What is trained on this rank. A training run adds its data (``train/job``); benchmarks and
    tests need none.

    Args:
        chunks: this rank's, in the order of the pipeline.
        ddp_chunks: the chunks with their gradient reduction.
        optimizer: of what is trained of all of them.
        trained: what that is, over the whole model.
        part_norms: norms of its parts.
    """

    chunks: list[VisionLanguageModel]
    ddp_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    trained: Trained
    part_norms: PartNorms


def build_model(
    config: Config,
    layout: Layout,
    groups: Groups,
    backend: Backend,
    fill: Callable[[Sequence[VisionLanguageModel]], None],
    history: History = (),
) -> BuiltModel:
    """Build, fill, freeze and wrap this rank's chunks, and create their optimizer. Collective.

    Args:
        config: the run.
        layout: of the pipeline.
        groups: process groups, and this rank's index in each.
        backend: where tensors live.
        fill: gives the chunks their weights.
        history: earlier stages whose moments are kept.
    """
    numbers = range(groups.pipeline_rank, config.parallel.chunks, groups.pipeline_size)
    chunks = [VisionLanguageModel(config, layout, groups, number) for number in numbers]
    has_nf4 = bool(config.architecture.lora.nf4)
    if has_nf4:
        for chunk in chunks:
            nf4_layers.mark_shards(chunk)
    else:
        _move(chunks, backend)
    fill(chunks)
    start_magnitudes(chunks)
    if has_nf4:
        quantised = nf4_layers.quantise(chunks, backend.device)
        _move(chunks, backend)
        for module in quantised:
            nf4_layers.clear(module)
    trained = freeze.apply(chunks, config.training)
    ddp_chunks = wrap_chunks(config, chunks)
    set_schedule_hooks(ddp_chunks)
    optimizer = build_optimizer(config, ddp_chunks, stage_moments.ages(chunks, history))
    return BuiltModel(
        chunks=chunks,
        ddp_chunks=ddp_chunks,
        optimizer=optimizer,
        trained=trained,
        part_norms=PartNorms(chunks, optimizer, backend.device),
    )


def _move(chunks: Sequence[VisionLanguageModel], backend: Backend) -> None:
    for chunk in chunks:
        chunk.to(backend.device)
