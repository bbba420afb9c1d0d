"""The control pass: the loss of training packs whose images are blank. A model that loses nothing
by it ignores its images, which its loss alone does not show.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch

from megavlm.parallel.process_groups import Groups
from megavlm.train.evaluate import blanked, evaluating
from megavlm.train.job import Job
from megavlm.train.meters import Clock, Figures, Meter
from megavlm.train.microbatches import Microbatches
from megavlm.train.optimizer import whole_weights
from megavlm.train.step import run_packs


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

    def run(self, step: int, packs: Microbatches) -> Microbatches:
        """Measure the loss of a step's packs without images, if that is due, and return the packs
        to train on. Collective.

        Args:
            step: the number of the step, from 1.
            packs: of the step; all are held in the host's memory, pixels too.
        """
        if not self._interval or step % self._interval:
            return packs
        batches = list(islice(packs.batches, packs.count))
        chunks = self._job.ddp_chunks
        backend = self._job.backend
        if backend.device.type == "cuda":
            torch.cuda.synchronize(backend.device)  # what is still computed counts as training
        with self._clock.paused(), whole_weights(chunks), evaluating(chunks), torch.no_grad():
            blank = blanked(iter(batches), self._job.config.architecture.vision)
            loss = run_packs(chunks, replace(packs, batches=blank), backend, forward_only=True)
            self._loss = float(self._job.groups.sum_over_data(loss))
        return replace(packs, batches=iter(batches))

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``loss_without_images`` of the last step, if it had a control pass."""
        found = self._loss
        self._loss = None
        return {} if found is None else {"loss_without_images": found}
