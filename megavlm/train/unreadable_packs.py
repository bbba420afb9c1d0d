"""Packs that cannot be read: left out of their steps, alike on all ranks, up to a limit.

Each rank reads what it needs of a pack by itself: those of the first pipeline stage the images too,
and of these only their own tiles. So one rank may fail where the others of its replica do not, on a
damaged image or a broken disk; and the loss is divided by the weight of the packs of all replicas.
Therefore all ranks agree before each step which of its packs are left out.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch.distributed as dist

from megavlm.checkpoint.train_state import State
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.loader import Unreadable
from megavlm.train.bad_steps import StepError
from megavlm.train.job import Job
from megavlm.train.metrics import Metrics

_OPTION = "--data.max_unreadable_packs"
ADVICE = f"; to train on without up to 10 such packs: {_OPTION} 10"
_SHOWN_PACKS = 20


class UnreadablePacks:
    """Replaces packs that cannot be read by padding, which has no loss.

    Args:
        job: the run.
        state: where it starts; the packs that it names count.
        metrics: told of each pack once.
    """

    def __init__(self, job: Job, state: State, metrics: Metrics) -> None:
        self._job = job
        self._metrics = metrics
        self._most = job.config.data.max_unreadable_packs
        self._known = set(state.unreadable_packs)

    def replace(
        self,
        state: State,
        ids: np.ndarray,
        records: np.ndarray,
        batches: Iterator[Batch | Unreadable],
    ) -> tuple[Iterator[Batch], np.ndarray]:
        """Return this rank's batches of the step after ``state``, and what its packs hold: nothing,
        if they are left out. Collective, and waits for the device, if any may be left out.

        Args:
            state: before the step.
            ids: of the step's packs.
            records: of these packs in the index.
            batches: of this rank; those of later steps follow.

        Raises:
            StepError: there are too many such packs, or the step has no others.
        """
        if not self._most:
            return batches, records
        groups = self._job.groups
        own = range(groups.data_rank, len(ids), groups.data_size)
        arrived = list(islice(batches, len(own)))
        failed = {
            index: f"rank {groups.rank} ({socket.gethostname()}): {item.reason}"
            for index, item in zip(own, arrived, strict=True)
            if isinstance(item, Unreadable)
        }
        if not groups.any_rank(bool(failed), self._job.backend.device):
            return _handed_over(deque(arrived)), records
        reasons = _of_all_ranks(failed)
        self._count(state.step + 1, {int(ids[index]): reasons[index] for index in sorted(reasons)})
        if len(reasons) == len(ids):
            raise StepError(
                f"step {state.step + 1}: none of its packs can be read, so there is no loss; the"
                " warnings above say why. Mend the data, and resume from the last checkpoint"
            )
        options = self._job.training_options
        for place, index in enumerate(own):
            if index in reasons:
                position = state.consumed + index
                arrived[place] = self._job.train.blank(int(ids[index]), position, options)
        left = records.copy()
        left[list(reasons)] = np.zeros((), records.dtype)
        return _handed_over(deque(arrived)), left

    def _count(self, step: int, reasons: dict[int, str]) -> None:
        """Name the packs that were not known before; raise StepError if there are too many, which
        they may have been before a run resumed with a lower limit.
        """
        for pack_id, reason in reasons.items():
            is_new = pack_id not in self._known
            self._known.add(pack_id)
            what = (
                f"step {step}: pack {pack_id} of {self._job.train.file_of(pack_id)} cannot be read"
            )
            if len(self._known) > self._most:
                raise StepError(
                    f"{what} ({reason}); with it there are {len(self._known)} such packs, more"
                    f" than {_OPTION} {self._most}; mend the data, or resume from the last"
                    " checkpoint with a higher limit"
                )
            if is_new:
                self._metrics.log(
                    f"WARNING: {what} and is left out, {len(self._known)} of at most {self._most}"
                    f" ({_OPTION}): {reason}"
                )

    def after(self, state: State) -> State:
        """Return ``state`` with the packs that a run that resumes has to know."""
        return dataclasses.replace(state, unreadable_packs=tuple(sorted(self._known)))

    def tell(self) -> None:
        """Say how many packs were left out in the whole run."""
        if self._known:
            shown = ", ".join(map(str, sorted(self._known)[:_SHOWN_PACKS]))
            more = ", ..." if len(self._known) > _SHOWN_PACKS else ""
            self._metrics.log(
                f"WARNING: {len(self._known)} packs could not be read and were left out"
                f" ({_OPTION} {self._most}): {shown}{more}"
            )


def _handed_over(packs: deque[Batch]) -> Iterator[Batch]:
    """Yield packs and keep none: those of the next step come before this step is forgotten."""
    while packs:
        yield packs.popleft()


def _of_all_ranks(failed: dict[int, str]) -> dict[int, str]:
    """Return why packs of a step cannot be read, by their places in it, of any rank; of several the
    first one's reason. Collective.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, failed)
    return {index: why for of_rank in reversed(everywhere) for index, why in of_rank.items()}
