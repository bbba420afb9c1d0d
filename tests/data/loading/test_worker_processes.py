"""Loader workers start, end and are signalled as the training process wants it, and no other."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import WorkerError, batches
from megavlm.data.loading.order import Plan
from tests.data.loading.test_loader import load
from tests.data.samples import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=7)
    return PackedDataset(folder)


@pytest.fixture(autouse=True)
def others():
    """Return the processes of other tests, such as their ranks; no worker is left beside them."""
    before = set(multiprocessing.active_children())
    # Without the garbage collector, so that it is not left to chance when they end.
    gc.disable()
    yield before
    gc.enable()
    assert set(multiprocessing.active_children()) <= before


def test_a_stream_that_ends_leaves_the_workers_of_another_one_alone(dataset):
    """As an evaluation does, while training waits."""
    training = batches(
        dataset,
        Plan(num_packs=7, shuffle=False),
        range(99),
        BatchOptions(with_tiles=False),
        workers=1,
    )
    next(training)
    assert len(load(dataset, range(3), workers=1)) == 3
    assert [next(training).pack_id for _ in range(9)] == [1, 2, 3, 4, 5, 6, 0, 1, 2]
    training.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyTorch's
def test_a_worker_that_cannot_be_started_is_told_with_the_option(dataset, others, monkeypatch):
    pids = [os.fork]

    def fork():
        if not pids:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return pids.pop()()

    monkeypatch.setattr(os, "fork", fork)
    told = r"--data.workers 2: .*Errno 12\] Cannot allocate memory"
    with pytest.raises(WorkerError, match=told) as caught:
        load(dataset, range(3), workers=2)
    deadline = time.monotonic() + 30
    # The other one ends, although the error is kept.
    while not set(multiprocessing.active_children()) <= others:
        assert time.monotonic() < deadline and caught.value
        time.sleep(0.05)


class Signalled(PackedDataset):
    """Packs on whose way to a worker it gets the signal that ends a process group."""

    def __reduce__(self):
        return open_signalled, (self.folder,)


def open_signalled(folder):
    os.kill(os.getpid(), signal.SIGTERM)
    return PackedDataset(folder)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_worker_outlives_a_signal_to_the_process_group_while_it_starts(dataset, start_method):
    packs = Signalled(dataset.folder)
    assert len(load(packs, range(3), workers=1, start_method=start_method)) == 3


TRAINER = """
import multiprocessing, os, signal, sys, time
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import WorkerError, batches
from megavlm.data.loading.order import Plan

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
stream = batches(
    PackedDataset(sys.argv[1]), Plan(num_packs=7), range(10**6),
    workers=2, start_method=sys.argv[2],
)
next(stream)
print("ready", flush=True)
while len(asked) < 2:
    time.sleep(0.02)
for _ in range(20):
    next(stream)
print(len(asked), *(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[3] == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_method", "end"), [("fork", "crash"), ("fork", "leave"), ("forkserver", "crash")]
)
def test_workers_outlive_signals_to_the_process_group_and_not_the_training_process(
    dataset, start_method, end
):
    command = [sys.executable, "-c", TRAINER, str(dataset.folder), start_method, end]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **pipes) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(trainer.pid, number)
            time.sleep(0.2)
        output, errors = trainer.communicate(timeout=120)
    assert trainer.returncode == (-signal.SIGKILL if end == "crash" else 0), errors
    asked, *workers = map(int, output.split())
    assert asked == 2 and len(workers) == 2
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
