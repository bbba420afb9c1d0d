"""What observes training: the protocol of meters, and the time that training takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from megavlm.data.loading.batch import Batch
from megavlm.model.objective.losses import Losses
from megavlm.parallel.process_groups import Groups

Figures = dict[str, float | dict[str, float]]
"""Figures by name: a number, or one for each source of the data."""


class Meter(Protocol):
    """Counts what is trained on, and reports it from time to time; it changes nothing.

    A meter inherits from this class and overrides what it needs: ``add`` and ``add_step`` do
    nothing by themselves.
    """

    def add(self, losses: Losses, batch: Batch, weight_of_step: float) -> None:
        """Count a microbatch after its forward pass. The training loop calls this on ranks that
        have the last model chunk; it must not wait for the device.

        Args:
            losses: of each token on this rank, by name too; the gradient may still need them.
            batch: the microbatch.
            weight_of_step: sum of the loss weights of all packs of the step, over all ranks.
        """

    def add_step(self, packs: np.ndarray) -> None:
        """Count a step; every rank calls this.

        Args:
            packs: records in the index of the step's packs, those of all ranks.
        """

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return the figures since the last report, and start anew. Collective: every rank calls
        this, after it has waited for the gradient norm of the last step, so nothing that was
        counted is still to be computed.

        Args:
            groups: process groups, for sums over ranks.
            steps: steps since the last report.
        """
        ...


class Clock:
    """The time that training takes, without pauses."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside: evaluation, saving."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def seconds(self) -> float:
        """Return the seconds since the clock was made, less its pauses."""
        return time.perf_counter() - self._start


def collect_reports(
    meters: Sequence[Meter], groups: Groups, steps: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Collect the reports of all meters. Collective.

    Returns:
        Figures by name, and figures of each source by name.
    """
    figures: dict[str, float] = {}
    by_source: dict[str, dict[str, float]] = {}
    for meter in meters:
        for name, figure in meter.report(groups, steps).items():
            if isinstance(figure, dict):
                by_source[name] = figure
            else:
                figures[name] = figure
    return figures, by_source
