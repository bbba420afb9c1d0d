"""The record of training steps: loss, learning rate, gradient norm, and what the meters report."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megavlm.checkpoint.train_state import State
from megavlm.train.group_rates import GroupRates
from megavlm.train.job import Job
from megavlm.train.meters import Meter, collect_reports
from megavlm.train.metrics import Metrics


class StepLog:
    """Records the steps since the last record, every ``--logging.interval`` steps.

    Args:
        job: the run.
        meters: their figures are recorded in this order.
        metrics: get the figures.
        step: updates that are done when the run starts.
    """

    def __init__(self, job: Job, meters: Sequence[Meter], metrics: Metrics, step: int):
        self._job = job
        self._meters = meters
        self._metrics = metrics
        self._recorded = step
        self._rates = GroupRates(job.config)

    def record(self, state: State, loss: Tensor, grad_norm: float, rate: float) -> None:
        """Write a record. Collective: it sums over the ranks, and waits for the device.

        Args:
            state: after the step.
            loss: this rank's part of the step's loss.
            grad_norm: of the step's gradient before clipping.
            rate: the step's learning rate.
        """
        groups = self._job.groups
        whole_loss = float(groups.sum_over_data(loss))
        reports, by_source = collect_reports(self._meters, groups, state.step - self._recorded)
        self._recorded = state.step
        figures = {"loss": whole_loss, "lr": rate, "grad_norm": grad_norm} | reports
        if self._job.config.bad_steps.skips:
            figures["skipped_steps"] = state.skipped
        if self._job.config.data.max_unreadable_packs:
            figures["unreadable_packs"] = len(state.unreadable_packs)
        by_source |= self._rates.at(state.step - 1, rate)
        self._metrics.record(state.step, figures, by_source)
