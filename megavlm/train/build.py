"""The model of a run on this rank, ready to be trained: whoever trains builds it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megavlm.checkpoint.train_state import History
from megavlm.config.schema import Config
from megavlm.model import freeze
from megavlm.model.freeze import Trained
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Layout
from megavlm.train import optimizer, stage_moments
from megavlm.train.step import prepare


@dataclass(frozen=True, kw_only=True)
class Built:
    """What is trained on this rank.

    Args:
        chunks: this rank's, in the order of the pipeline.
        wrapped: the chunks with their gradient reduction.
        optimizer: AdamW over what is trained of all of them.
        trained: what that is, over the whole model.
    """

    chunks: list[VisionLanguageModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    trained: Trained


def build(
    config: Config,
    layout: Layout,
    place: Groups,
    machine: Backend,
    fill: Callable[[Sequence[VisionLanguageModel]], object],
    history: History = (),
) -> Built:
    """Build, fill, freeze and wrap this rank's chunks, and create their optimizer. Collective.

    Args:
        config: the run.
        layout: of the pipeline.
        place: process groups and this rank's place.
        machine: where tensors live.
        fill: gives the chunks their weights.
        history: earlier stages whose moments are gone on with.
    """
    numbers = range(place.pipeline_rank, config.parallel.chunks, place.pipeline_size)
    chunks = [
        VisionLanguageModel(config, layout, place, number).to(machine.device) for number in numbers
    ]
    fill(chunks)
    trained = freeze.apply(chunks, config.training.trainable)
    wrapped = optimizer.wrap(config, chunks)
    prepare(wrapped)
    adamw = optimizer.build(config, wrapped, stage_moments.ages(chunks, history))
    return Built(chunks=chunks, wrapped=wrapped, optimizer=adamw, trained=trained)
