"""Everything that a run is made of, once it is built."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megavlm.checkpoint.lock import Lock
from megavlm.config.schema import Config
from megavlm.data.loading.blend import BlendedDataset
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Order
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of a run on this rank.

    Args:
        config: the run.
        backend: where tensors live.
        groups: process groups, and this rank's index in each.
        train: the training packs.
        plan: their order.
        valid: the held-out packs, if any.
        chunks, ddp_chunks, optimizer: as in ``Built``.
        lock: of the save folder, on the rank that holds it.
    """

    config: Config
    backend: Backend
    groups: Groups
    train: PackedDataset | BlendedDataset
    plan: Order
    valid: PackedDataset | None
    chunks: list[VisionLanguageModel]
    ddp_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    lock: Lock | None = None
