"""The control pass: the loss of training packs whose images are blank. A model that loses nothing
by it ignores its images, which its loss alone does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from megavlm.data.loading.batch import Batch
from megavlm.parallel.process_groups import Groups
from megavlm.train.evaluate import blanked, evaluating
from megavlm.train.job import Job
from megavlm.train.meters import Clock, Figures, Meter
from megavlm.train.optimizer import whole_weights
from megavlm.train.step import WeightOfPack, run_packs


class ControlPass(Meter):
    """Runs the packs of every n-th step forward with blank images, before the step does.

    Args:
        job: the run.
        clock: does not count the passes.
    """

    def __init__(self, job: Job, clock: Clock) -> None:
        self._job = job
        self._clock = clock
        self._interval = job.config.eval.control_interval
        self._loss: float | None = None

    def run(
        self,
        step: int,
        batches: Iterator[Batch],
        count: int,
        weight: float,
        weight_of_pack: WeightOfPack | None,
    ) -> Iterator[Batch]:
        """Measure the loss of a step's packs without images, if that is due, and return the
        batches to train on. Collective.

        Args:
            step: the number of the step, from 1.
            batches: packs of this data-parallel rank, in order.
            count: packs of the step; all are held in the host's memory, pixels too.
            weight: sum of the loss weights of all packs of the step, over all ranks.
            weight_of_pack: takes its place, as in ``run_packs``.
        """
        if not self._interval or step % self._interval:
            return batches
        packs = list(islice(batches, count))
        chunks = self._job.ddp_chunks
        backend = self._job.backend
        if backend.device.type == "cuda":
            torch.cuda.synchronize(backend.device)  # what is still computed counts as training
        with self._clock.paused(), whole_weights(chunks), evaluating(chunks), torch.no_grad():
            loss = run_packs(
                chunks,
                blanked(iter(packs), self._job.config.architecture.vision),
                count,
                weight,
                backend,
                forward_only=True,
                weight_of_pack=weight_of_pack,
            )
            self._loss = float(self._job.groups.sum_over_data(loss))
        return iter(packs)

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``loss_without_images`` of the last step, if it had a control pass."""
        found = self._loss
        self._loss = None
        return {} if found is None else {"loss_without_images": found}
