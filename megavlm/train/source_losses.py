"""The loss of each source of the data: summed on the device step by step, looked at when it is
reported.

Shapes: S sources, T tokens of the pack on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.data.loading.batch import Batch
from megavlm.model.objective.losses import Losses
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter

# Sums are whole numbers of these fractions. Adding whole numbers gives the same in any order, and
# GPUs add in any order.
LOSS_UNIT = 2.0**-20
PART_UNIT = 2.0**-40


class SourceLosses(Meter):
    """Sums of the losses of each source since the last report, on this rank.

    Args:
        names: of the sources, as ``Batch.sources`` numbers them.
        device: where the sums are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        # Losses, supervised tokens, and parts of the step's loss.
        self._sums = torch.zeros((3, len(self.names)), dtype=torch.int64, device=device)

    def add(self, losses: Losses, batch: Batch, weight_of_step: float) -> None:
        """Count the totals of a pack's tokens on this rank. Losses that are not finite are left
        out: integers cannot hold them.
        """
        totals = losses.total.detach().float()
        is_supervised = (batch.loss_weights > 0) & totals.isfinite()
        totals = torch.where(is_supervised, totals, 0.0)
        rows = torch.stack(
            [
                totals / LOSS_UNIT,
                is_supervised.float(),
                totals * batch.loss_weights / weight_of_step / PART_UNIT,
            ]
        )
        self._sums.index_add_(1, batch.sources, rows.round().to(torch.int64))

    def report(self, groups: Groups, steps: int = 1) -> Figures:
        """Sum up the losses since the last report, for sources that had supervised tokens; empty on
        all but the last chunk. Collective.

        Args:
            groups: whose data-parallel and context-parallel ranks counted other tokens.
            steps: that were counted.

        Returns:
            ``loss``: mean loss of each source's supervised tokens, every one counted alike,
                whatever ``--data.loss_reduction`` is. ``loss_part``: each source's part of the
                loss that was trained on; the parts add up to the mean of the steps' losses.
        """
        sums = groups.sum_over_data(self._sums.clone()).cpu()
        self._sums.zero_()
        found = [
            (name, *column)
            for name, column in zip(self.names, sums.T.tolist(), strict=True)
            if column[1]
        ]
        means = {name: losses * LOSS_UNIT / tokens for name, losses, tokens, _ in found}
        parts = {name: part * PART_UNIT / steps for name, _, _, part in found}
        return {"loss": means, "loss_part": parts}
