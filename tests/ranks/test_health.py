"""Ranks that are late for a while, or slow, in real runs."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megavlm.config.cli import to_yaml
from megavlm.config.schema import Config, Health, Logging, Parallel
from megavlm.health import speed_check
from megavlm.health.watchdog import Mark, Watchdog
from megavlm.parallel import backend, process_groups
from tests.data.samples import make_dataset
from tests.ranks import late_rank
from tests.ranks.commands import become_rank, free_port
from tests.ranks.pool import Pool, start_process
from tests.ranks.runs import TINY, config_for, make_packs
from tests.ranks.test_resume import make_job, run_job

RANKS = 2
PATIENCE_SECONDS = 240
LATE_SECONDS = 10
LOST_SECONDS = 3
# The rank that sleeps 0.1 s is some 30 times slower in exchanges and 300 times in products; ranks
# that share a core with other processes can be five times slower than each other for a moment.
SLOW_FACTOR = 10.0


# How rank 1 is late, at which tensor-parallel size, and what the report says.
LATE = {
    "sleeps": (
        2,
        [
            r"it waits for rank 1, in no collective",
            r"rank 1 \(on .*\): step 4; in no collective\n.*late_rank.py:\d+ _sleep",
        ],
    ),
    "freezes": (
        1,
        [
            r"it waits for rank 1, not answering",
            r"rank 0 \(on .*\): step 4, .*; in gloo:\w+ number \d+ of group DATA_",
        ],
    ),
}


def start_rank(rank: int, port: int, how: str, config: Path, local_size: int) -> None:
    become_rank(rank, RANKS, port, config.with_suffix(""))
    os.environ.update(LOCAL_RANK=str(rank % local_size), LOCAL_WORLD_SIZE=str(local_size))
    late_rank.main(how, LATE_SECONDS if how in LATE else PATIENCE_SECONDS, config)


def start_ranks(folder: Path, how: str, tensor: int, local_size: int = RANKS) -> list[Process]:
    """Start the ranks of a run on the packs ``train`` in a folder, of which one is late or ends;
    ``local_size`` of them believe to be on one machine.
    """
    config = config_for(folder / "train", steps=6, tensor_model_parallel_size=tensor)
    quick = Health(
        hang_factor=1, hang_seconds=3, lost_machine_seconds=LOST_SECONDS, speed_check=False
    )
    checkpoint = dataclasses.replace(config.checkpoint, save_interval=0)
    config = dataclasses.replace(
        config, health=quick, logging=Logging(interval=1), checkpoint=checkpoint
    )
    path = folder / f"{how}.yaml"
    path.write_text(to_yaml(config))
    port = free_port()
    return [start_process(start_rank, rank, port, how, path, local_size) for rank in range(RANKS)]


def make_small_packs(folder: Path) -> None:
    """Make the packs of a run."""
    sizes = dict(
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=TINY.features_per_tile,
        capacity=128,
    )
    make_dataset(folder / "train", packs=8, **sizes)


@pytest.fixture(scope="module")
def late_runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, list[Process]]]]:
    """Start runs with a late rank, side by side, since they spend most of their time waiting."""
    folder = tmp_path_factory.mktemp("late")
    make_small_packs(folder)
    # On a machine each, of which one is silent for longer than a machine that is lost.
    runs = {how: start_ranks(folder, how, tensor, 1) for how, (tensor, _) in LATE.items()}
    yield folder, runs
    for process in (each for run in runs.values() for each in run):
        process.kill()
        process.join()


@pytest.mark.parametrize("how", LATE)
def test_a_rank_that_is_late_is_named_with_what_the_others_wait_in(
    late_runs: tuple[Path, dict[str, list[Process]]], how: str
) -> None:
    folder, runs = late_runs
    for process in runs[how]:
        process.join(PATIENCE_SECONDS)
    words = (folder / f"{how}.0.out").read_text()
    errors = "".join((folder / f"{how}.{rank}.err").read_text() for rank in range(RANKS))
    assert all(process.exitcode == 0 for process in runs[how]) and "step 6 " in words, errors
    report = errors[errors.index("made no progress") :]
    assert all(re.search(told, report, re.DOTALL) for told in LATE[how][1]), errors
    assert "the run continued" in report
    assert "nothing was heard" not in errors and "no connection" not in errors


@pytest.mark.parametrize("how", ["ends", "ends early"])
def test_a_rank_whose_process_has_ended_ends_the_others(tmp_path: Path, how: str) -> None:
    make_small_packs(tmp_path)
    waiting, killed = start_ranks(tmp_path, how, 1)
    waiting.join(PATIENCE_SECONDS / 2)  # it would wait for longer by itself
    for process in (waiting, killed):
        process.kill()
        process.join()
    errors = (tmp_path / f"{how}.0.err").read_text()
    assert (waiting.exitcode, killed.exitcode) == (1, -signal.SIGKILL), errors
    assert re.search(r"the process of rank 1 \(on .*\) has ended.* the others end in 3 s", errors)


# Which rank ends, alone on its machine, and what the other one says.
LOST = {
    "ends": (1, r"nothing was heard of .* \(rank 1\) for \d+ s, and it takes no connection: it is"),
    "first ends": (
        0,
        r"the key-value store at .* has not answered for \d+ s, and takes no connection: its",
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_machine_that_is_lost_ends_those_of_the_others(tmp_path: Path, how: str) -> None:
    ending, told = LOST[how]
    make_small_packs(tmp_path)
    processes = start_ranks(tmp_path, how, 1, local_size=1)
    killed = processes.pop(ending)
    [waiting] = processes
    waiting.join(PATIENCE_SECONDS / 2)  # it would wait for longer by itself
    for process in (waiting, killed):
        process.kill()
        process.join()
    errors = (tmp_path / f"{how}.{1 - ending}.err").read_text()
    assert (waiting.exitcode, killed.exitcode) == (1, -signal.SIGKILL), errors
    assert re.search(told, errors), errors


def marks_of(config: Config) -> list[str]:
    """Run a job; return what the watchdog of this rank noted of the evaluation before it."""
    marks: list[str] = []
    note = Watchdog._note

    def noted(self: Watchdog, mark: Mark) -> None:
        marks.append(str(mark))
        note(self, mark)

    with patch.object(Watchdog, "_note", noted):
        run_job(config)
    return [mark for mark in marks if mark.startswith("evaluation 0")]


def test_each_validation_pack_is_a_sign_of_life_on_every_rank(ranks: Pool, tmp_path: Path) -> None:
    make_packs(tmp_path / "packs", packs=3)
    pipeline = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
    config = make_job(tmp_path / "packs", "", steps=1, save_interval=0, **pipeline)
    data = dataclasses.replace(config.data, valid=config.data.train)
    expected = ["evaluation 0", "evaluation 0, waits for pack 1"]
    for pack in (1, 2, 3):
        expected.append(f"evaluation 0, pack {pack} came last")
        expected.append(f"evaluation 0, waits for pack {pack + 1}")
    for marks in ranks.run(marks_of, 2, dataclasses.replace(config, data=data)):
        assert [mark for mark in expected[:-1] if mark not in marks] == [], marks


def speeds_with_a_slow_rank(slow: int) -> tuple[list[str], str]:
    """Measure speeds while one rank sleeps before each exchange and product; return the findings
    and the line with the figures.
    """
    exchange = dist.batch_isend_irecv
    multiply = torch.mm

    def late(function: Callable) -> Callable:
        def wrapped(*arguments):
            if dist.get_rank() == slow:
                time.sleep(0.1)
            return function(*arguments)

        return wrapped

    device_backend = backend.start(5)
    groups = process_groups.create(Parallel(tensor_model_parallel_size=2), seed=1)
    with (
        patch.object(dist, "batch_isend_irecv", late(exchange)),
        patch.object(torch, "mm", late(multiply)),
    ):
        speeds, found = speed_check.check(groups, device_backend, Health(slow_factor=SLOW_FACTOR))
    return found, speed_check.summary(speeds)


def test_a_rank_that_is_slow_with_all_its_partners_is_named(ranks: Pool) -> None:
    answers = ranks.run(speeds_with_a_slow_rank, 4, 2)
    found, summary = answers[0]
    assert all(answer == answers[0] for answer in answers[1:])
    assert [
        line for line in found if "exchanges" in line and line.startswith("rank 2 ")
    ] and "tensor groups" in summary, found
    assert [line for line in found if "computes" in line and line.startswith("rank 2 ")], found
    assert all(line.startswith("rank 2 ") for line in found if "exchanges" in line), found
