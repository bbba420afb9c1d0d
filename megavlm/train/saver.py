"""Save a run's checkpoints, and report saves that failed.

A failed save costs the checkpoint that was being written and nothing else: earlier ones stay, what
was written of it is removed, and training continues to the next one. Only if the last save of a run
fails does the run end with an error.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint import checksums, directory, train_state
from megavlm.checkpoint.async_writer import Writing
from megavlm.checkpoint.lock import FILE_NAME as LOCK_NAME
from megavlm.checkpoint.rank_errors import gather_errors, raised_on_all
from megavlm.checkpoint.shared_loading import Replicas
from megavlm.checkpoint.shared_saving import share
from megavlm.checkpoint.step_folder import CONFIG_NAME, SHARDS, TOKENIZER
from megavlm.checkpoint.train_state import State
from megavlm.checkpoint.whole_shards import ShardError
from megavlm.config.cli import to_yaml
from megavlm.convert.hf import preprocessing, unused_weights
from megavlm.data.store.manifest import FILE_NAME as MANIFEST_NAME
from megavlm.io.storage import open_folder
from megavlm.train import checkpoint
from megavlm.train.disk_room import SPARE_BYTES
from megavlm.train.job import Job
from megavlm.train.master_weights import MismatchError
from megavlm.train.metrics import Metrics
from megavlm.train.optimizer import whole_weights

_SPARE = ".spare"
# Free beside it when writing begins, for the small file that comes before the shards.
_FIRST_BYTES = 1 << 18
# A wait for the checkpoint before that is worth a word.
_TOLD_SECONDS = 1.0


class SaveError(RuntimeError):
    """A checkpoint that could not be saved, at the end of a run."""


class Saver:
    """Writes checkpoints of a job, one at a time. Every method is collective.

    Args:
        job: the run.
        metrics: told of each save.
        step: of the checkpoint that the run resumed from, 0 without one.
    """

    def __init__(self, job: Job, metrics: Metrics, step: int):
        self.step = step
        self._job = job
        self._metrics = metrics
        self._root = Path(job.config.checkpoint.save)
        self._beside = job.config.checkpoint.asynchronous
        self._writing: Writing | None = None
        self._state = State()
        self._growing = Path()
        self._start = 0.0
        self._problem = ""
        self._dataset: dict[str, bytes] = {}
        with raised_on_all():
            if job.config.checkpoint.save and job.groups.rank == 0:
                self._dataset = _files_of_dataset(job.train.folder)

    def save(self, state: State) -> None:
        """Save the run as it is; if writing continues beside training, the weights may change when
        this returns.
        """
        self._wait_for_the_one_before(state.step)
        config = self._job.config
        is_last = state.step >= config.training.steps
        state = replace(state, trained_only=config.checkpoint.trained_only and not is_last)
        self._state = state
        self._start = time.perf_counter()
        self._problem = ""
        name: list = [directory.growing_name(state.step)]
        dist.broadcast_object_list(name)  # rank 0's
        self._growing = self._root / name[0]
        if self._agree(self._on_first(self._prepare)):
            return
        job = self._job
        with whole_weights(job.ddp_chunks):
            try:
                tensors = checkpoint.sharded(
                    job.chunks,
                    job.optimizer,
                    job.config.fp8,
                    is_loading=False,
                    averaged=job.averages,
                )
                kept = share(
                    checkpoint.held(state, config, tensors["model"]),
                    Replicas.of(job.groups.collection),
                )
                tensors["model"] = checkpoint.dequantised(kept, job.chunks)
                self._writing = Writing(tensors, self._growing / SHARDS, beside=self._beside)
            except (MismatchError, ShardError) as error:  # on every rank
                self._give_up(str(error))
                return
        if not self._beside:
            self.wait()

    def _wait_for_the_one_before(self, step: int) -> None:
        """Publish the checkpoint that is being written, if any, before that of ``step``; tell if
        training stands still for it.
        """
        before = self._state.step
        start = time.perf_counter()
        self.wait()
        seconds = time.perf_counter() - start
        if seconds >= _TOLD_SECONDS:
            self._metrics.log(
                f"WARNING: the checkpoint of step {step} waited {seconds:.1f} s until that of step"
                f" {before} was written, and so did training; to save less often:"
                " --checkpoint.save_interval"
            )

    def poll(self) -> None:
        """Publish the checkpoint that is being written beside training, if all ranks are done with
        it.
        """
        if self._writing is not None:
            done = torch.tensor([float(self._writing.is_done)], device=self._job.backend.device)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any, and publish it."""
        if self._writing is None:
            return
        writing = self._writing
        self._writing = None
        outcome = writing.wait()
        known: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(known, outcome.sums or {})
        if self._agree(outcome.error):
            return
        self._on_first(lambda: (self._growing / _SPARE).unlink())
        if self._agree(writing.describe()):
            return
        sums = {name: found for share in known for name, found in share.items()}
        if self._agree(self._on_first(lambda: self._publish(sums))):
            return
        self.step = self._state.step
        target = self._root / directory.step_name(self.step)
        seconds = time.perf_counter() - self._start
        self._metrics.log(f"saved {target} in {seconds:.1f} s" + " beside training" * self._beside)
        if self._job.groups.rank == 0:
            self._drop_old(target)

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            SaveError: it could not be saved.
        """
        self.wait()
        if self._problem:
            raise SaveError(self._problem)

    def _on_first(self, action: Callable[[], None]) -> str:
        """Run ``action`` on rank 0, and return what went wrong with it."""
        if self._job.groups.rank:
            return ""
        try:
            action()
        except Exception as error:  # the others wait to hear of it, whatever it is
            return f"{type(error).__name__}: {error}"
        return ""

    def _agree(self, error: str) -> bool:
        """Whether saving failed on any rank; then it is told and cleared away."""
        listed = gather_errors(error)
        if listed:
            self._give_up(listed + self._free())
        return bool(listed)

    def _free(self) -> str:
        """Say how much room there is where checkpoints go; empty if that cannot be told."""
        try:
            free = shutil.disk_usage(self._root).free
        except OSError:  # the folder is gone, or its file system is
            return ""
        return (
            f"; {free / 2**20:,.0f} MiB are free there, of which {SPARE_BYTES / 2**20:.0f} MiB stay"
            " free beside the shards"
        )

    def _give_up(self, error: str) -> None:
        """Tell that the checkpoint could not be saved, and clear it away."""
        self._problem = (
            f"--checkpoint.save {self._root}: the checkpoint of step {self._state.step} could not"
            f" be saved ({error}); the last checkpoint is of step {self.step}"
        )
        if self._job.groups.rank == 0:
            shutil.rmtree(self._growing, ignore_errors=True)
        self._metrics.log(f"ERROR: {self._problem}")

    def _check_lock(self) -> None:
        """Make sure that no other run saves here. If only the lock is gone, or the whole folder,
        it is made again.

        Raises:
            OSError: another run has saved here or does so, or nothing can be written.
        """
        lock = self._job.lock
        if lock is None:
            return
        found = directory.candidates(self._root)
        if lock.is_gone and (not found or directory.step_of(found[0]) == self.step):
            lock.take_again()
            self._metrics.log_own(
                f"WARNING: --checkpoint.save {self._root}: somebody removed {LOCK_NAME}, or the"
                " folder; it is made again"
            )
        lock.check()

    def _prepare(self) -> None:
        self._check_lock()
        (self._growing / SHARDS).mkdir(parents=True)
        with (self._growing / _SPARE).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SPARE_BYTES + _FIRST_BYTES)
            file.truncate(SPARE_BYTES)

    def _publish(self, sums: dict[str, checksums.Sum]) -> None:
        """Add the small files to the shards, then give the checkpoint its name."""
        self._check_lock()
        config = self._job.config
        growing = self._growing
        (growing / CONFIG_NAME).write_text(to_yaml(config), encoding="utf-8")
        for name, content in self._dataset.items():
            (growing / name).parent.mkdir(parents=True, exist_ok=True)
            (growing / name).write_bytes(content)
        unused_weights.write(self._job.unused_weights, growing)
        if self._job.usage is not None:
            preprocessing.write(self._job.usage, growing)
        train_state.write(self._state, growing)
        checksums.write(growing, sums)
        target = self._root / directory.step_name(self._state.step)
        # Shards are flushed by those who write them, two files of each rank.
        directory.publish(growing, target, flushed=sums.keys())

    def _drop_old(self, target: Path) -> None:
        """Remove the checkpoints that ``target`` makes superfluous. It is whole whether or not that
        succeeds.
        """
        files = self._job.config.checkpoint
        try:
            problems = directory.drop_old(
                self._root, target, files.keep, files.keep_best, files.best_by
            )
        except OSError as error:  # the folder cannot be listed
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            self._metrics.log_own(
                f"WARNING: --checkpoint.keep {files.keep}: older checkpoints of {self._root} could"
                f" not be removed, and take up room ({'; '.join(problems)})"
            )


def _files_of_dataset(folder: str | Path) -> dict[str, bytes]:
    """Read what each checkpoint holds of its training set, by name. The folder of the packs may be
    gone, or hold others, when a checkpoint is saved.
    """
    with tempfile.TemporaryDirectory(prefix="megavlm-") as temporary:
        for name in (MANIFEST_NAME, TOKENIZER):
            open_folder(folder).copy(name, Path(temporary) / name)
        return {
            str(path.relative_to(temporary)): path.read_bytes()
            for path in sorted(Path(temporary).rglob("*"))
            if path.is_file()
        }
