"""A run on this rank: the model that is trained, and its data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megavlm.checkpoint.lock import Lock
from megavlm.config.schema import Config
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.unused_weights import Weights
from megavlm.data.loading.batch import Batch, BatchOptions, options_of
from megavlm.data.loading.blend import Packs
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import Unreadable, batches
from megavlm.data.loading.order import Order
from megavlm.evaluate.packs import TaskPacks
from megavlm.evaluate.pair_packs import PairPacks
from megavlm.model.precision import tile_multiple
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.train.averages import Averages
from megavlm.train.build_model import BuiltModel


@dataclass(frozen=True, kw_only=True)
class Job(BuiltModel):
    """What is trained on this rank, and everything around it.

    Args:
        config: the run.
        backend: where tensors live.
        groups: process groups, and this rank's index in each.
        train: the training packs.
        plan: their order.
        valid: the validation packs, if any.
        tasks: what the model is asked at each evaluation.
        lock: of the save folder, on the rank that holds it.
        averages: of the trained parameters, if they are asked for.
        unused_weights: what only files hold of the vision encoder, on the first rank; see
            ``convert/hf/unused_weights``.
        watch: passes packs on that are loaded, and notes that they come; the loop has the
            watchdog's.
        usage: how images become tiles for the model that the run started from, if its packs have
            none.
    """

    config: Config
    backend: Backend
    groups: Groups
    train: Packs
    plan: Order
    valid: PackedDataset | None
    tasks: tuple[TaskPacks | PairPacks, ...] = ()
    lock: Lock | None = None
    averages: Averages | None = None
    unused_weights: Weights = field(default_factory=dict)
    watch: Callable[[Iterator[Batch | Unreadable]], Iterator[Batch | Unreadable]] = iter
    usage: Usage | None = None

    def samples_of_ranks(self, records: np.ndarray) -> list[list[int]]:
        """Return the samples of each pack that each data-parallel rank has in a step.

        Args:
            records: in the index, of all packs of the step, in order; the ranks take them in turn.
        """
        samples = records["samples"]
        ranks = self.groups.data_size
        return [samples[rank::ranks].tolist() for rank in range(ranks)]

    @property
    def batch_options(self) -> BatchOptions:
        """How this rank reads packs, without what is random in training."""
        architecture = self.config.architecture
        return dataclasses.replace(
            options_of(architecture),
            reduction=self.config.data.loss_reduction,
            with_pair_ids=architecture.needs_pair_ids,
            with_preferences=architecture.needs.is_of_preferences,
            with_tiles=self.chunks[0].pre_process,
            rank_slice=self.groups.rank_slice,
            tile_multiple=tile_multiple(self.config),
        )

    @property
    def training_options(self) -> BatchOptions:
        """How this rank reads packs to train on."""
        return dataclasses.replace(
            self.batch_options,
            patches=self.config.architecture.vision.patch_choice,
            seed=self.config.training.seed,
        )

    def batches(
        self,
        packs: Packs,
        plan: Order,
        positions: Sequence[int],
        options: BatchOptions,
        *,
        workers: int,
    ) -> Generator[Batch | Unreadable, None, None]:
        """Load packs ahead; ``close()`` ends the workers. See ``loader.batches``.

        Args:
            packs: to load.
            plan: their order.
            positions: indices into the order.
            options: how they are read.
            workers: loader processes.
        """
        loaded = batches(
            packs,
            plan,
            positions,
            options,
            workers=workers,
            prefetch=self.config.data.prefetch,
            timeout=self.config.data.timeout,
        )
        with contextlib.closing(loaded):
            yield from self.watch(loaded)
