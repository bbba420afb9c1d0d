"""The control pass: the loss of training packs whose images are blank. A model that loses nothing
by it ignores its images, which its loss alone does not show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from megavlm.data.loading.batch import Batch
from megavlm.parallel.process_groups import Groups
from megavlm.train.evaluate import blanked, evaluating
from megavlm.train.job import Job
from megavlm.train.meters import Clock, Figures, Meter
from megavlm.train.optimizer import whole_weights
from megavlm.train.step import WeightOfPack, run_packs


class ControlPass(Meter):
    """Runs the packs of every n-th step forward again, behind its update, with blank images.

    Args:
        job: the run.
        clock: does not count the passes.
    """

    def __init__(self, job: Job, clock: Clock) -> None:
        self._job = job
        self._clock = clock
        self._interval = job.config.eval.control_interval
        self._is_due = False
        self._packs: list[Batch] = []
        self._loss: float | None = None

    def enter_step(self, step: int) -> None:
        """Note that a step begins, counted from 1."""
        self._is_due = self._interval > 0 and step % self._interval == 0

    def kept(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, and keep those of a step that has a control pass, without pixels."""
        for batch in batches:
            if self._is_due:
                no_pixels = batch.tiles.new_zeros(()).expand(batch.tiles.shape)
                self._packs.append(dataclasses.replace(batch, tiles=no_pixels))
            yield batch

    @torch.no_grad()
    def run(self, weight: float, weight_of_pack: WeightOfPack | None) -> None:
        """Measure the loss of the step's packs without images, if that is due. Collective.

        Args:
            weight: sum of the loss weights of all packs of the step, over all ranks.
            weight_of_pack: takes its place, as in ``run_packs``.
        """
        if not self._is_due:
            return
        job = self._job
        packs = self._packs
        self._packs = []
        if job.backend.device.type == "cuda":
            torch.cuda.synchronize(job.backend.device)  # the clock counts what is still computed
        chunks = job.ddp_chunks
        with self._clock.paused(), whole_weights(chunks), evaluating(chunks):
            loss = run_packs(
                chunks,
                blanked(iter(packs), job.config.architecture.vision),
                len(packs),
                weight,
                job.backend,
                forward_only=True,
                weight_of_pack=weight_of_pack,
            )
            self._loss = float(job.groups.sum_over_data(loss))

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``loss_without_images`` of the last step, if it had a control pass."""
        found = self._loss
        self._loss = None
        return {} if found is None else {"loss_without_images": found}
