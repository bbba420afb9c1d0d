"""Batches ahead of time: worker processes read and decode the packs that the training process will
ask for next.
"""

from __future__ import annotations

import contextlib
import multiprocessing.sharedctypes
import os
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megavlm.data.images.decode import load_decoders
from megavlm.data.loading.batch import AS_PACKED, Batch, BatchOptions
from megavlm.data.loading.blend import Packs
from megavlm.data.loading.order import Order
from megavlm.data.loading.worker_processes import (
    failing_with_workers,
    how_ended,
    ignore_signals_but_from_parent,
    kill_frozen,
    starting_workers,
)
from megavlm.io.storage import ReadError

# How the words for a worker that is gone begin, PyTorch's and ours.
DIED = "DataLoader worker"
STUCK = "DataLoader timed out"
_READING_SECONDS = 5.0


def batches(
    dataset: Packs,
    plan: Order,
    positions: Sequence[int],
    options: BatchOptions = AS_PACKED,
    *,
    workers: int = 0,
    prefetch: int = 2,
    timeout: float = 0,
    start_method: str | None = None,
) -> Generator[Batch | Unreadable, None, None]:
    """Yield the batches at ``positions`` of the plan, in order, and what takes the place of one
    whose pack cannot be read. The number of workers never changes what a batch holds. ``close()``
    ends the workers.

    Args:
        dataset: the packs.
        plan: their order.
        positions: in the order. Rank r of n data-parallel ranks that resumes after ``consumed``
            packs gives ``range(consumed + r, end, n)``, which takes no memory.
        options: how the packs are read.
        workers: processes that decode; 0: this one.
        prefetch: packs that each worker keeps ready.
        timeout: seconds after which a worker is given up; 0: never.
        start_method: how workers start (fork, spawn, forkserver); None: as the platform does.

    Raises:
        WorkerError: a worker died or is stuck; names its pack, and where the samples come from. Or
            one cannot be started, or cannot hand over what it has made.
    """
    board = WorkerStatusBoard(workers)
    loader = DataLoader(
        Positions(dataset, plan, positions, options, board),
        batch_size=None,
        # Its own, so that loading does not advance the global generator of the training process.
        generator=torch.Generator(),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=timeout if workers else 0,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=start_method if workers else None,
    )
    arriving, processes = _start(loader, start_method)
    try:
        for position in positions:
            try:
                with failing_with_workers(processes):
                    arrived = next(arriving)
            except Exception as error:
                if not workers:
                    raise
                raise _explain(error, dataset, plan, position, board, processes) from None
            if isinstance(arrived, WorkerError):
                raise arrived
            yield arrived
    finally:
        del arriving  # nothing else holds DataLoader's iterator, so the workers end
        kill_frozen(processes)


def readable(
    batches: Generator[Batch | Unreadable, None, None], advice: str = ""
) -> Generator[Batch, None, None]:
    """Yield batches as long as their packs can be read; ``close()`` closes them.

    Raises:
        ReadError: one cannot; names the pack, and the file at fault or the sample's file and line,
            and ends in ``advice``.
    """
    with contextlib.closing(batches):
        for batch in batches:
            if isinstance(batch, Unreadable):
                raise ReadError(f"{batch.reason}{advice}")
            yield batch


class WorkerError(RuntimeError):
    """A loader worker that died, is stuck, cannot be started or cannot hand over a batch."""


@dataclass(frozen=True)
class Unreadable:
    """What takes the place of a batch whose pack cannot be read or decoded.

    Args:
        reason: names the pack, and the file at fault or the sample's file and line.
    """

    reason: str


class WorkerStatusBoard:
    """The batch that each worker is making, in memory shared with the training process.

    Args:
        workers: number of workers.
    """

    def __init__(self, workers: int) -> None:
        # Process, position, since when (ms) of each.
        self._slots = multiprocessing.sharedctypes.RawArray("q", 3 * workers)

    def start(self, worker: int, position: int) -> None:
        """Note that a worker starts to make the batch at a position."""
        self._slots[3 * worker : 3 * worker + 3] = [
            os.getpid(),
            position,
            time.monotonic_ns() // 10**6,
        ]

    def end(self, worker: int) -> None:
        """Note that a worker has made its batch."""
        self._slots[3 * worker + 1] = -1

    def at_work(self) -> list[tuple[int, int, float]]:
        """Process, position and seconds so far of each worker that is making a batch."""
        now = time.monotonic_ns() // 10**6
        slots = [self._slots[index : index + 3] for index in range(0, len(self._slots), 3)]
        return [
            (process, position, (now - since) / 1000)
            for process, position, since in slots
            if process and position >= 0
        ]


class Positions(Dataset):
    """The batches of a plan's positions, as a map-style dataset of PyTorch.

    In every process the fast decoders are loaded behind its first batch, which would otherwise have
    to wait for them.
    """

    def __init__(
        self,
        dataset: Packs,
        plan: Order,
        positions: Sequence[int],
        options: BatchOptions,
        board: WorkerStatusBoard,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.positions = positions
        self.options = options
        self.board = board
        self._has_pixels = dataset.has_images and options.with_tiles
        self._has_made_one = False

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Batch | Unreadable | WorkerError:
        position = int(self.positions[index])
        worker = get_worker_info()
        if worker is None:
            return self._make(position)
        self.board.start(worker.id, position)
        try:
            made = self._make(position)
            return made if isinstance(made, Unreadable) else self._shared(made, position)
        finally:
            self.board.end(worker.id)

    def _shared(self, batch: Batch, position: int) -> Batch | WorkerError:
        """Put a batch where the training process gets it. PyTorch would do so in a thread whose
        errors nobody hears of, and the batch would be waited for. An error is returned, since
        PyTorch would put the worker's stack into its words.
        """
        try:
            return batch.share_memory()
        except RuntimeError as error:
            return WorkerError(
                f"pack {int(self.plan.at(position))}: a loader worker could not hand it over in"
                f" shared memory ({error}); if /dev/shm is full, make it larger, in a container by"
                " --ipc host or --shm-size, or use fewer --data.workers or a lower --data.prefetch"
            )

    def _make(self, position: int) -> Batch | Unreadable:
        if self._has_made_one and self._has_pixels:
            load_decoders()
        self._has_made_one = True
        try:
            return self.dataset.batch(int(self.plan.at(position)), position, self.options)
        except ReadError as error:
            return Unreadable(str(error))


def _start(
    loader: DataLoader, start_method: str | None
) -> tuple[Iterator[Batch | Unreadable | WorkerError], list[BaseProcess]]:
    """Return what the workers of a loader make, and the workers."""
    try:
        with starting_workers(start_method) as processes:
            return iter(loader), processes
    except OSError as error:
        error.with_traceback(None)  # without DataLoader's frames, so that those started end
        raise WorkerError(
            f"--data.workers {loader.num_workers}: a loader worker cannot be started ({error}); use"
            " fewer, or give the job more memory, processes (ulimit -u, --pids-limit of a"
            " container), open files or /dev/shm"
        ) from None


def _explain(
    error: Exception,
    dataset: Packs,
    plan: Order,
    position: int,
    board: WorkerStatusBoard,
    processes: Sequence[BaseProcess],
) -> Exception:
    """Return the error to raise if workers deliver nothing: their own, or one that says which of
    them died.
    """
    # Without DataLoader's own frames, which keep the workers running as long as the error lives;
    # its text has the worker's.
    error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    # A worker that dies while it hands a batch over leaves half of one behind.
    if str(error).startswith((DIED, STUCK)) or isinstance(error, EOFError | ConnectionError):
        return _worker_is_gone(dataset, plan, position, board, processes, error)
    return error


def _wait_for_end(processes: Sequence[BaseProcess]) -> str:
    """Say how workers ended; what they leave behind may arrive a moment before they are gone."""
    for _ in range(40):
        if ended := how_ended(processes):
            return ended
        time.sleep(0.05)
    return ""


def _worker_is_gone(
    dataset: Packs,
    plan: Order,
    position: int,
    board: WorkerStatusBoard,
    processes: Sequence[BaseProcess],
    error: Exception,
) -> WorkerError:
    """Describe a worker that died or is stuck: the pack it was at, and its samples' origins."""
    text = f"{type(error).__name__} {error}"
    at_work = board.at_work()
    if STUCK not in text:
        # In the place of PyTorch's words, which do not tell how.
        text = _wait_for_end(processes) or text
        alive = {process.pid for process in processes if process.is_alive()}
        gone = [each for each in at_work if each[0] not in alive]
        advice = (
            "Out of memory (see the kernel log), a full /dev/shm, or a file that crashes the image"
            " decoder are common causes; --data.workers 0 shows which"
        )
    else:
        gone = [each for each in at_work if each[1] == position]
        advice = (
            "a storage that does not answer, or an image that takes very long; --data.timeout sets"
            " the limit"
        )
    at = [
        (
            int(plan.at(index)),
            (
                f"process {process} was at pack {int(plan.at(index))} (position {index}) for"
                f" {seconds:.1f} s"
            ),
        )
        for process, index, seconds in gone
    ]
    pack_ids = [pack_id for pack_id, _ in at] or [int(plan.at(position))]
    return WorkerError(
        f"{dataset.folder}: no batch for pack {int(plan.at(position))} (position {position}):"
        f" {text.rstrip('. ')}."
        f" {'; '.join(words for _, words in at) or 'no process was at it'}. {advice}."
        f" {_samples(dataset, pack_ids)}"
    )


def _samples(dataset: Packs, pack_ids: Sequence[int]) -> str:
    """Say where the samples of packs come from. What holds a worker up may hold up this reading
    too, so another thread reads, and is not waited for long.
    """
    origins: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError, ReadError):
            origins.extend([origin for pack_id in pack_ids for origin in dataset.origins(pack_id)])

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(_READING_SECONDS)
    if origins:
        return f"The samples: {', '.join(origins)}"
    files = dict.fromkeys(map(dataset.file_of, pack_ids))
    return f"The samples are unknown, since {', '.join(files)} cannot be read now"


def _unchanged(made: Batch | Unreadable | WorkerError) -> Batch | Unreadable | WorkerError:
    """Return what was made as it is. The DataLoader calls this to collate."""
    return made


def _start_worker(worker: int) -> None:
    """One thread for each worker: many workers already fill the cores. None ends before the
    training process says so.
    """
    torch.set_num_threads(1)
    ignore_signals_but_from_parent()
