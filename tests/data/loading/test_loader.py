"""Workers never change a batch, what goes wrong in one is named, and none is left behind."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from megavlm.data.loading import loader
from megavlm.data.loading.batch import Batch, BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import (
    Unreadable,
    WorkerError,
    WorkerStatusBoard,
    batches,
    readable,
)
from megavlm.data.loading.order import Plan
from megavlm.io.storage import ReadError
from tests.data.loading.test_dataset import write_broken_image
from tests.data.samples import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=7, shard_bytes=5000)
    return PackedDataset(folder)


@pytest.fixture(autouse=True)
def no_worker_is_left_behind():
    # Without the garbage collector, so that it is not left to chance when they end.
    gc.disable()
    yield
    gc.enable()
    assert not multiprocessing.active_children()


BY_TOKEN = BatchOptions(reduction="token")
NO_TILES = BatchOptions(with_tiles=False)  # whose decoders are loaded for seconds
DRAWN = BatchOptions(reduction="sample", vision_layers=2, seed=9)


def load(dataset: PackedDataset, positions: range, **workers) -> list[Batch]:
    plan = Plan(num_packs=len(dataset), seed=4)
    return list(batches(dataset, plan, positions, DRAWN, **workers))


def test_order_and_content(dataset):
    plan = Plan(num_packs=7, seed=4)
    found = load(dataset, range(3, 20))
    assert [batch.pack_id for batch in found] == plan.pack_ids(3, 17).tolist()
    expected = dataset.batch(found[5].pack_id, 8, DRAWN)
    assert found[5] == expected


@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"workers": 2, "prefetch": 1}, {"workers": 1, "start_method": "spawn"}],
    ids=["one", "two", "spawn"],
)
def test_workers_do_not_change_batches(dataset, options):
    expected = load(dataset, range(10))
    found = load(dataset, range(10), **options)
    assert len(found) == 10 and found == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(dataset, workers):
    before = torch.get_rng_state()
    load(dataset, range(3), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_out_the_sequence(dataset):
    whole = load(dataset, range(2, 14))
    shares = [load(dataset, range(2 + rank, 14, 3)) for rank in range(3)]
    assert all(batch == shares[place % 3][place // 3] for place, batch in enumerate(whole))


def test_positions_take_no_memory(dataset):
    stream = batches(dataset, Plan(num_packs=7), range(10**12 + 1, 10**15, 4), BY_TOKEN)
    assert next(stream).pack_id == Plan(num_packs=7).at(10**12 + 1)
    stream.close()


def test_close_ends_the_workers(dataset):
    stream = batches(dataset, Plan(num_packs=7), range(10**9), BY_TOKEN, workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    stream.close()
    assert not multiprocessing.active_children()
    assert [worker.exitcode for worker in workers] == [0, 0], "they ended, and none was killed"


class Faulty(PackedDataset):
    """Packs that a mistake in the code keeps from being made."""

    def batch(self, pack_id, position, options):
        raise EOFError("a mistake")


def test_a_mistake_in_the_code_keeps_its_traceback_without_workers(dataset):
    with pytest.raises(EOFError, match="^a mistake$") as caught:
        next(batches(Faulty(dataset.folder), Plan(num_packs=7), range(3)))
    assert caught.traceback[-1].name == "batch"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, workers):
    write_broken_image(tmp_path)
    with pytest.raises(
        ReadError, match=r"pack 0: image 0 of the pack, from the sample at captions.jsonl:41"
    ) as caught:
        next(
            readable(
                batches(PackedDataset(tmp_path), Plan(num_packs=1), range(5), workers=workers),
                advice="; ask for help",
            )
        )
    assert "Traceback" not in str(caught.value)  # a worker's, which PyTorch puts into the message
    assert str(caught.value).endswith("; ask for help")


@pytest.mark.parametrize(
    ("workers", "damage", "told"),
    [
        (0, lambda path: os.truncate(path, 100), r"ends inside pack \d"),
        (1, Path.unlink, r"pack \d: .*No such file"),
    ],
)
def test_a_file_that_is_damaged_while_a_run_reads_it_is_named(tmp_path, workers, damage, told):
    make_dataset(tmp_path, packs=7, shard_bytes=5000)
    last = max(tmp_path.glob("*.bin"))
    stream = readable(
        batches(
            PackedDataset(tmp_path),
            Plan(num_packs=7, shuffle=False),
            range(7),
            BY_TOKEN,
            workers=workers,
            prefetch=1,
        )
    )
    next(stream)
    damage(last)
    with pytest.raises(ReadError, match=told) as caught:
        list(stream)
    assert str(last) in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_packs_behind_one_that_cannot_be_read_come_as_ever(tmp_path, workers):
    make_dataset(tmp_path, packs=7, shard_bytes=5000)
    plan = Plan(num_packs=7, shuffle=False)
    dataset = PackedDataset(tmp_path)
    expected = list(batches(dataset, plan, range(7)))
    gone = Path(dataset.file_of(3))
    lost = [pack for pack in range(7) if dataset.file_of(pack) == str(gone)]
    gone.unlink()
    found = list(
        batches(PackedDataset(tmp_path, with_shards=False), plan, range(7), workers=workers)
    )
    assert [pack for pack in range(7) if isinstance(found[pack], Unreadable)] == lost
    assert all(re.search(rf": pack {pack}: .*{gone.name}", found[pack].reason) for pack in lost)
    assert all(found[pack] == expected[pack] for pack in range(7) if pack not in lost)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"was killed by signal 9 \(SIGKILL\)"),
        (signal.SIGTERM, "exited unexpectedly with status 0"),
    ],
)
def test_a_worker_that_dies_is_named(dataset, number, told):
    stream = batches(
        dataset,
        Plan(num_packs=7, shuffle=False),
        range(7, 10**6),
        BY_TOKEN,
        workers=1,
        prefetch=1,
    )
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    with pytest.raises(
        WorkerError,
        match=(
            rf"no batch for pack (1 \(position 8\)|2 \(position 9\)): DataLoader worker \(pid"
            rf" {worker.pid}\) {told}\. .*--data.workers 0.* random.jsonl:\d+"
        ),
    ):
        for _ in range(3):
            next(stream)


def test_a_worker_that_dies_is_told_of_only_where_a_batch_is_waited_for(dataset):
    stream = batches(
        dataset,
        Plan(num_packs=7, shuffle=False),
        range(10**6),
        BY_TOKEN,
        workers=2,
        prefetch=1,
    )
    next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # the training process is at something else when the news arrives
    with pytest.raises(WorkerError, match=r"no batch for pack [123] .*killed by signal 9 \(SIGK"):
        for _ in range(3):
            next(stream)


def test_a_board_tells_of_the_workers_that_are_making_a_batch():
    board = WorkerStatusBoard(4)
    assert board.at_work() == []
    for worker, position in ((1, 0), (2, 7), (3, 8)):
        board.start(worker, position)
    board.end(2)
    time.sleep(0.1)
    (first, second) = board.at_work()
    assert (first[:2], second[:2]) == ((os.getpid(), 0), (os.getpid(), 8))
    assert 0.1 <= first[2] < 60 and 0.1 <= second[2] < 60, "seconds"


class Noted(PackedDataset):
    """Packs of which a file tells that they were made."""

    def batch(self, pack_id, position, options):
        made = super().batch(pack_id, position, options)
        (self.folder / f"made-{position}").touch()
        return made


def test_a_worker_makes_so_many_packs_ahead_and_is_at_none_then(tmp_path):
    make_dataset(tmp_path, packs=7)
    plan = Plan(num_packs=7, shuffle=False)
    stream = batches(Noted(tmp_path), plan, range(99), NO_TILES, workers=1, prefetch=4)
    next(stream)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("made-*"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # in which one that does not wait would make all
    assert len(list(tmp_path.glob("made-*"))) == 5
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"no batch for pack 1 .* no process was at it\."):
        list(stream)


class Killed(PackedDataset):
    """Packs of which one, number 5, ends the worker that makes it, as soon as another worker is at
    number 6, which takes long.
    """

    def batch(self, pack_id, position, options):
        wait_beside(self.folder, pack_id, seconds=2)
        if pack_id == 5:
            while not (self.folder / "beside").exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(pack_id, position, options)


def wait_beside(folder: Path, pack_id: int, seconds: float) -> None:
    if pack_id == 6:
        (folder / "beside").touch()
        time.sleep(seconds)


class Gone(PackedDataset):
    """Packs on a disk that is gone when one asks where samples come from."""

    def origins(self, pack_id):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_samples_that_cannot_be_read_are_told_of_in_words_alone(dataset):
    stream = batches(
        Gone(dataset.folder), Plan(num_packs=7, shuffle=False), range(99), workers=1, prefetch=1
    )
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"The samples are unknown, since .*/packs-\d+.bin cannot"
    ):
        list(stream)


class NoRoom(PackedDataset):
    """Packs of which one, number 5, finds no room in shared memory."""

    def batch(self, pack_id, position, options):
        made = super().batch(pack_id, position, options)
        if pack_id == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        return made


def test_a_batch_that_finds_no_room_in_shared_memory_is_named(dataset):
    stream = batches(
        NoRoom(dataset.folder),
        Plan(num_packs=7, shuffle=False),
        range(7, 100),
        NO_TILES,
        workers=1,
        timeout=30,
    )
    with pytest.raises(WorkerError, match=r"pack 5: .*shared memory \(unable to .*--shm-size"):
        for _ in range(7):
            next(stream)


class Stuck(PackedDataset):
    """Packs of which one, number 5, cannot be read: whoever tries waits. Number 6 takes long."""

    def batch(self, pack_id, position, options):
        wait_beside(self.folder, pack_id, seconds=9)
        if pack_id == 5:
            (self.folder / "stuck").write_text(str(os.getpid()))
            time.sleep(600)
        return super().batch(pack_id, position, options)

    def origins(self, pack_id):
        time.sleep(60)
        return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words", "samples"),
    [
        (Killed, r"killed by signal 9 \(SIGKILL\)\.", r"The samples: random.jsonl:\d+"),
        (Stuck, "timed out after 5", r"The samples are unknown, since .*/packs-\d+.bin cannot"),
    ],
)
def test_the_pack_that_a_worker_is_lost_at_is_named(dataset, monkeypatch, kind, words, samples):
    monkeypatch.setattr(loader, "_READING_SECONDS", 0.5 if kind is Stuck else 60)
    stream = batches(
        kind(dataset.folder),
        Plan(num_packs=7, shuffle=False),
        range(100),
        NO_TILES,
        workers=2,
        timeout=5 if kind is Stuck else 60,
    )
    (dataset.folder / "stuck").write_text("")
    (dataset.folder / "beside").unlink(missing_ok=True)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError,
        match=rf"{words}.* was at pack 5 \(position 5\) for \d+\.\d s.* {samples}",
    ) as caught:
        next(stream)
        workers = multiprocessing.active_children()
        for number in range(1, 7):
            if number == 5 and kind is Stuck:
                while not os.path.getsize(dataset.folder / "stuck"):
                    assert time.monotonic() - start < 60
                    time.sleep(0.05)
                # It does not obey SIGTERM from now on, as in code that holds Python's lock.
                os.kill(int((dataset.folder / "stuck").read_text()), signal.SIGSTOP)
            next(stream)
    assert all(thread.daemon for thread in threading.enumerate()[1:]), "this process would not end"
    assert (dataset.folder / "beside").exists() and "at pack 6" not in str(caught.value)
    if kind is Killed:
        assert str(caught.value).endswith(f"The samples: {', '.join(dataset.origins(5))}")
        # The other one ended by itself, although the error is kept.
        assert sorted(worker.exitcode for worker in workers) == [-signal.SIGKILL, 0]
    while multiprocessing.active_children():  # one that is stuck is ended after a few seconds
        assert time.monotonic() - start < 60
        time.sleep(0.05)
