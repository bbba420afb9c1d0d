"""A profile of some steps of a run, by torch.profiler: one trace for each rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megavlm.config.schema import Profile
from megavlm.train.metrics import Metrics


class ProfiledSteps:
    """Profiles this rank while the steps of the window run; as a context manager it writes what
    there is if the run ends inside the window.

    Args:
        settings: which steps, and where the traces go.
        rank: this rank.
        metrics: told where the traces are, or that there will be none.
        step: updates that are done.
    """

    def __init__(self, settings: Profile, rank: int, metrics: Metrics, step: int):
        self._settings = settings
        self._rank = rank
        self._metrics = metrics
        self._running: profile | None = None
        if settings.folder and step >= settings.first_step:
            metrics.log(
                f"WARNING: --profile.first_step {settings.first_step}: step {step} is done already;"
                f" for a profile of this run use {step + 1} or more"
            )

    def enter_step(self, step: int) -> None:
        """Begin or end the profile, before step ``step``, counted from 1."""
        settings = self._settings
        if not settings.has_rank(self._rank):
            return
        if step == settings.first_step:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(
                activities=activities, record_shapes=True, profile_memory=settings.memory
            )
            self._running.start()
        elif step == settings.first_step + settings.step_count:
            self._write()

    def _write(self) -> None:
        """End the profile and write the trace, if one is running."""
        if self._running is None:
            return
        running = self._running
        self._running = None
        running.stop()
        settings = self._settings
        last = settings.first_step + settings.step_count - 1
        name = f"steps_{settings.first_step}_to_{last}_rank_{self._rank}.json.gz"
        path = Path(settings.folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except OSError as error:
            self._metrics.log_own(
                f"ERROR: --profile.folder {settings.folder}: no trace of rank {self._rank}"
                f" ({error})"
            )
            return
        if self._rank == min(settings.ranks, default=0):
            self._metrics.log_own(
                f"profile: traces of steps {settings.first_step} to {last} are in {path.parent}"
            )

    def __enter__(self) -> ProfiledSteps:
        return self

    def __exit__(self, *exception) -> None:
        self._write()
