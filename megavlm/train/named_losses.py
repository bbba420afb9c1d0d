"""The losses that an objective's total is made of, and its readings: summed on the device step by
step, looked at when they are reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.config.objectives import ObjectiveNeeds
from megavlm.config.schema import Architecture
from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.objective.losses import Losses
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter


class NamedLosses(Meter):
    """Means of named losses and readings since the last report.

    Args:
        architecture: whose objective names its losses and readings.
        device: where the sums are.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        needs: ObjectiveNeeds = architecture.needs
        self.names: Sequence[str] = tuple(needs.losses(architecture))
        self.readings: Sequence[str] = needs.readings
        # Float64, so that sums of many steps in another order differ by nothing that is shown.
        rows = len(self.names) + 2 * len(self.readings)
        self._sums = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, losses: Losses, batch: Batch, weight_of_step: float) -> None:
        """See ``Meter``."""
        found = [
            weighted_sum(losses.named[name].detach(), batch.loss_weights) / weight_of_step
            for name in self.names
        ]
        found += [part.detach() for name in self.readings for part in losses.readings[name]]
        if found:
            # A step that is skipped for it may be NaN; ``SourceLosses`` leaves it out, too.
            rows = torch.stack([one.double() for one in found])
            self._sums += torch.where(rows.isfinite().all(), rows, 0.0)

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``NAME_loss`` of each loss, the mean of the steps' losses, so that they add up to
        the mean total with their weights; and the mean of each reading. Empty on all but the last
        chunk, and for an objective of one loss. Collective.
        """
        sums = groups.sum_over_data(self._sums.clone()).tolist()
        self._sums.zero_()
        if not groups.has_last_chunk:
            return {}
        count = len(self.names)
        figures: Figures = {
            f"{name}_loss": value / steps
            for name, value in zip(self.names, sums[:count], strict=True)
        }
        pairs = zip(sums[count::2], sums[count + 1 :: 2], strict=True)
        return figures | {
            name: total / number
            for name, (total, number) in zip(self.readings, pairs, strict=True)
            if number
        }
