"""Skip steps whose gradient is not finite or whose loss is a spike, alike on all ranks, and end the
run if there are too many.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from megavlm.checkpoint.train_state import State
from megavlm.data.loading.blend import Packs
from megavlm.train.job import Job
from megavlm.train.metrics import Metrics

_SHOWN_PACKS = 4


class StepError(RuntimeError):
    """A step that cannot be trained or evaluated, or that has destroyed the weights; every rank
    knows of it.
    """


class BadStepRule:
    """Judges each step before its update, from numbers that are the same on all ranks.

    Args:
        job: the run.
        state: where it starts; its counts and losses are carried on.
        metrics: told of each bad step.
    """

    def __init__(self, job: Job, state: State, metrics: Metrics):
        self.settings = job.config.bad_steps
        self._job = job
        self._metrics = metrics
        self._skipped = state.skipped
        self._in_a_row = state.skipped_in_a_row
        known = state.recent_losses if self.settings.spike_factor else ()
        self._losses = deque(known, maxlen=self.settings.window)

    def skips(self, step: int, packs: Sequence[int], loss: Tensor, norm: Tensor) -> bool:
        """Decide whether a step has no update. Collective, and waits for the device.

        Args:
            step: its number on the console.
            packs: of the step.
            loss: this rank's part of the loss.
            norm: of the whole gradient, which all ranks have.

        Raises:
            StepError: a gradient is not finite, and such steps are not skipped.
        """
        settings = self.settings
        job = self._job
        loss = job.groups.from_writer(
            float(job.groups.sum_over_data(loss.clone())), job.backend.device
        )
        is_finite = math.isfinite(float(norm)) and math.isfinite(loss)
        what = f"its loss is {loss:.6g}, and the norm of its gradient is {float(norm):.6g}"
        if not is_finite and not settings.skip:
            raise StepError(
                f"step {step}: {what}, on packs {list(packs)} ({self._origins(packs)}); to skip"
                " such steps: --bad_steps.skip true"
            )
        limit = self._spike_limit
        is_spike = is_finite and loss > limit
        if is_spike:
            median = limit / settings.spike_factor
            what = (
                f"its loss {loss:.6g} is more than {settings.spike_factor:g} times"
                f" {median:.6g}, the median of the last {len(self._losses)} steps"
            )
        is_skipped = not is_finite or (is_spike and settings.spike_action == "skip")
        if is_skipped or is_spike:
            verb = "is skipped" if is_skipped else "is a spike"
            self._metrics.log(
                f"WARNING: step {step} {verb}: {what}; packs {list(packs)} ({self._origins(packs)})"
            )
        self._count(loss, is_skipped)
        return is_skipped

    @property
    def _spike_limit(self) -> float:
        """The largest loss that is no spike."""
        enough = max(self.settings.window // 2, 1)
        if not self.settings.spike_factor or len(self._losses) < enough:
            return math.inf
        return self.settings.spike_factor * statistics.median(self._losses)

    def _count(self, loss: float, is_skipped: bool) -> None:
        if is_skipped:
            self._skipped += 1
            self._in_a_row += 1
            return
        self._in_a_row = 0
        if self.settings.spike_factor:
            self._losses.append(loss)

    def after(self, state: State) -> State:
        """Return ``state`` with the counts and losses that a run that resumes needs."""
        return dataclasses.replace(
            state,
            skipped=self._skipped,
            skipped_in_a_row=self._in_a_row,
            recent_losses=tuple(self._losses),
            skipped_steps=(*state.skipped_steps, *self._not_in(state)),
        )

    def _not_in(self, state: State) -> tuple[int, ...]:
        """Return the number of the step at hand if it was skipped and the run has to know."""
        is_new = self._skipped > state.skipped
        return (state.step,) if is_new and self._job.config.training.frozen_until else ()

    def check_limits(self, step: int) -> None:
        """Raise StepError if too many steps were skipped."""
        settings = self.settings
        if not settings.skips:
            return
        limits = (
            ("most_in_a_row", settings.most_in_a_row, self._in_a_row, "steps in a row"),
            ("most", settings.most, self._skipped, "steps in all"),
        )
        for name, most, count, what in limits:
            if count >= most:
                raise StepError(
                    f"step {step}: {count} {what} were skipped (--bad_steps.{name} {most}); the"
                    " warnings above name their packs. Resume from the last checkpoint with a"
                    " lower --optimizer.lr, without these packs, or with a higher limit"
                )

    def _origins(self, packs: Sequence[int]) -> str:
        """Return where samples of the packs come from, on every rank: one prints a warning, another
        the error that ends the run. Collective; rank 0 reads.
        """
        told = [""]
        if self._job.groups.rank == 0:
            told = [_read_origins(self._job.train, packs)]
        dist.broadcast_object_list(told)
        return told[0]


def _read_origins(dataset: Packs, packs: Sequence[int]) -> str:
    """Return where samples of the packs come from."""
    told = [_read_origin(dataset, pack) for pack in packs[:_SHOWN_PACKS]]
    return "; ".join(told) + (", and others" if len(packs) > _SHOWN_PACKS else "")


def _read_origin(dataset: Packs, pack: int) -> str:
    """Return where samples of a pack come from, or that it cannot be read: other ranks wait for an
    answer.
    """
    try:
        return ", ".join(dataset.origins(pack)[:2])
    except (OSError, ValueError) as error:
        return f"records of pack {pack} cannot be read: {error}"
