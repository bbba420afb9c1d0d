"""Damaged checkpoints, a full disk, and checkpoints that are written beside training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import strategies

from megavlm.config.cli import from_yaml, to_yaml
from megavlm.config.schema import Config
from megavlm.train import resume
from megavlm.train.inspection import inspect
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_resume import STEPS, losses, make_job, run_job

# megatron-core 0.19 writes no such file.
HAS_COMMON_FILE = "register_default_common_strategies" in vars(strategies)
NEWEST = f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.6)
    return folder


@pytest.fixture(scope="module")
def whole(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run to the end, with checkpoints of step 3 and of the last one."""
    save = tmp_path_factory.mktemp("whole") / "run"
    ranks.run(run_job, 1, make_job(dataset, save))
    return save


def told(config: Config) -> tuple[str, str]:
    """Run a job; what it said, and the error that it ended with."""
    words = io.StringIO()
    error = ""
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
        try:
            run_job(config)
        except (ValueError, RuntimeError) as problem:
            error = str(problem)
    return words.getvalue(), error


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_model(path: Path) -> None:
    config = from_yaml(path)
    language = dataclasses.replace(config.architecture.language, num_layers=9)
    path.write_text(
        to_yaml(
            dataclasses.replace(
                config, architecture=dataclasses.replace(config.architecture, language=language)
            )
        )
    )
    (path.parent / "checksums.json").unlink()


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("shards/__0_0.distcp", _flip, "checksum differs"),
    ("shards/__0_0.distcp", lambda path: os.truncate(path, 1000), "1,000 bytes"),
    ("shards/__0_0.distcp", Path.unlink, "missing"),
    ("shards/.metadata", _flip, "checksum differs"),
    ("shards/metadata.json", Path.unlink, "missing"),
    ("state.json", Path.unlink, "missing"),
    ("state.json", lambda path: path.write_text("{"), "not the state"),
    ("config.yaml", _flip, "checksum differs"),
    ("config.yaml", _other_model, "num_layers: 9 in the checkpoint, 3 asked for"),
    ("checksums.json", lambda path: os.truncate(path, 50), "damaged"),
    ("", shutil.rmtree, "missing"),
]


def start_of(config: Config) -> tuple[str, str]:
    """Find the checkpoint that a run starts from; what was said, and the checkpoint's folder."""
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        first = inspect(config, 1)
        # What other ranks see of a network file system may be older.
        stale = mock.patch.object(resume.directory, "candidates", return_value=[])
        with stale if dist.get_rank() else contextlib.nullcontext():
            start = resume.find_undamaged(config, first)
    return words.getvalue(), start.folder.name


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_the_damage_is_named_and_the_checkpoint_before_is_taken(
    ranks: Pool,
    dataset: Path,
    whole: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / NEWEST / name)
    [(words, start), (_, other)] = ranks.run(start_of, 2, make_job(dataset, tmp_path / "run"))
    assert "WARNING" in words and str(tmp_path / "run" / NEWEST / name) in words
    assert reason in words and start == other == "step_00000003"


# One that is found when the run looks for its checkpoints, and one when it loads.
@pytest.mark.parametrize("name", ["state.json", "shards/__0_0.distcp"])
def test_a_run_goes_on_from_the_checkpoint_before(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    _flip(tmp_path / "run" / NEWEST / name)
    [(words, error)] = ranks.run(told, 1, make_job(dataset, tmp_path / "run"))
    assert not error and "WARNING" in words and str(tmp_path / "run" / NEWEST / name) in words
    assert "resuming after step 3" in words
    assert losses(tmp_path / "run") == losses(whole)[3:]
    shards = "shards/__0_0.distcp"
    assert (tmp_path / "run" / NEWEST / shards).read_bytes() == (
        whole / NEWEST / shards
    ).read_bytes()


def test_with_no_whole_checkpoint_left_nothing_is_overwritten(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for step in ("step_00000003", NEWEST):
        _flip(tmp_path / "run" / step / "shards" / "__0_0.distcp")
    [(_, error)] = ranks.run(told, 1, make_job(dataset, tmp_path / "run"))
    assert "no checkpoint of this run can be used" in error and error.count("checksum differs") == 2
    assert (tmp_path / "run" / NEWEST).is_dir()


def test_a_damaged_checkpoint_that_the_user_names_is_an_error_on_every_rank(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "old")
    _flip(tmp_path / "old" / NEWEST / "manifest.json")
    config = make_job(dataset, tmp_path / "new", load=tmp_path / "old")
    for _, error in ranks.run(told, 2, config):
        assert (
            f"--checkpoint.load {tmp_path / 'old' / NEWEST}" in error
            and "manifest.json: its bytes are not those" in error
        )
    by_size = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, verify="size")
    )
    [(words, error)] = ranks.run(told, 1, by_size)
    assert not error and f"resuming after step {STEPS}" in words


def with_small_files(config: Config, spare_bytes: int, rank: int) -> tuple[str, str]:
    """Run a job in which one rank can write no file above 300 kB, as if its disk were full."""
    from megavlm.train import saver

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    spare = saver.SPARE_BYTES
    vars(saver)["SPARE_BYTES"] = spare_bytes
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        return told(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        vars(saver)["SPARE_BYTES"] = spare


@pytest.fixture(scope="module")
def three_steps(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two tensor-parallel ranks to step 3."""
    save = tmp_path_factory.mktemp("three") / "run"
    config = make_job(dataset, save, tensor_model_parallel_size=2)
    short = dataclasses.replace(config.training, steps=3)
    ranks.run(run_job, 2, dataclasses.replace(config, training=short))
    return save


@pytest.mark.parametrize(
    ("beside", "spare_bytes", "rank"),
    [
        (False, 64 << 20, 0),
        (False, 1000, 1),
        (True, 1000, 1),
        *([(True, 1000, 0)] if asks_for_all() else []),
    ],
)
def test_a_full_disk_costs_the_checkpoint_that_was_being_written_and_no_other(
    ranks: Pool,
    dataset: Path,
    three_steps: Path,
    tmp_path: Path,
    beside: bool,
    spare_bytes: int,
    rank: int,
) -> None:
    shutil.copytree(three_steps, tmp_path / "run")
    config = make_job(dataset, tmp_path / "run", tensor_model_parallel_size=2)
    often = dataclasses.replace(config.checkpoint, save_interval=1, asynchronous=beside)
    answers = ranks.run(
        with_small_files, 2, dataclasses.replace(config, checkpoint=often), spare_bytes, rank
    )
    for _, error in answers:
        assert (
            f"--checkpoint.save {tmp_path / 'run'}: the checkpoint of step {STEPS} could not be"
            f" saved (rank {rank}: " in error
        )
        assert (
            "MiB are free there, of which " in error
            and "); the last checkpoint is of step 3" in error
        )
    assert answers[0][0].count("could not be saved") == STEPS - 3
    assert len(losses(tmp_path / "run")) == STEPS
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [
        "latest",
        "metrics.jsonl",
        "step_00000003",
    ]
    words, error = ranks.run(told, 2, config)[0]
    assert not error and "resuming after step 3" in words


def without_description(config: Config, name: str) -> tuple[str, str]:
    """Run a job in which the disk fails when rank 0 writes a file about the shards."""
    import builtins

    def refuse(path: object, *options: object, **more: object) -> io.IOBase:
        if str(path).endswith(name):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *options, **more)

    def save_where_a_folder_is(content: object, path: object, **more: object) -> None:
        if str(path).endswith(name):
            Path(path).mkdir()
        save(content, path, **more)

    opened = builtins.open
    save = torch.save
    vars(builtins)["open"] = refuse
    vars(io)["open"] = refuse
    vars(torch)["save"] = save_where_a_folder_is
    try:
        return told(config)
    finally:
        vars(torch)["save"] = save
        vars(builtins)["open"] = opened
        vars(io)["open"] = opened


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".metadata.tmp", "OSError: [Errno 5] Input/output error"),
        ("metadata.json", "OSError: [Errno 5] Input/output error"),
        *([("common.pt", "RuntimeError: ")] if HAS_COMMON_FILE else []),
    ],
)
def test_shards_that_cannot_be_described_are_a_failed_save_on_every_rank(
    ranks: Pool, dataset: Path, tmp_path: Path, name: str, reason: str
) -> None:
    config = make_job(dataset, tmp_path / "run", tensor_model_parallel_size=2)
    for _, error in ranks.run(without_description, 2, config, name):
        assert (
            f"--checkpoint.save {tmp_path / 'run'}: the checkpoint of step {STEPS} could not"
            in error
        )
        assert f"(rank 0: {reason}" in error and name.removesuffix(".tmp") in error


def with_slow_disk(config: Config) -> tuple[str, str]:
    """Run a job in which rank 1 writes the first checkpoint when training is done, for more than a
    second.
    """
    from megavlm.checkpoint import async_writer

    write = async_writer._write

    def slowly(*arguments) -> async_writer.Outcome:
        if dist.get_rank() == 1:
            while len(losses(Path(config.checkpoint.save))) < STEPS:
                time.sleep(0.05)
            time.sleep(1.2)
        return write(*arguments)

    vars(async_writer)["_write"] = slowly
    try:
        return told(config)
    finally:
        vars(async_writer)["_write"] = write


def without_processes(config: Config) -> tuple[str, str]:
    """Run a job in which rank 1 has no memory for a process that writes."""

    def start_or_refuse(process: BaseProcess) -> None:
        if dist.get_rank() == 1 and process.name == "checkpoint":
            raise OSError(12, "Cannot allocate memory")
        start(process)

    start = BaseProcess.start
    with mock.patch.object(BaseProcess, "start", start_or_refuse):
        return told(config)


def test_a_rank_that_cannot_start_its_writing_process_costs_the_checkpoint_alone(
    ranks: Pool, dataset: Path, three_steps: Path, tmp_path: Path
) -> None:
    shutil.copytree(three_steps, tmp_path / "run")
    config = make_job(dataset, tmp_path / "run", tensor_model_parallel_size=2)
    beside = dataclasses.replace(config.checkpoint, asynchronous=True)
    config = dataclasses.replace(config, checkpoint=beside)
    for _, error in ranks.run(without_processes, 2, config):
        assert "(rank 1: OSError: [Errno 12] Cannot allocate memory" in error
    assert len(losses(tmp_path / "run")) == STEPS


@pytest.mark.parametrize(
    "layout",
    [
        *([dict()] if asks_for_all() else []),
        dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3"),
    ],
)
def test_checkpoints_written_beside_training_have_the_same_bytes(
    ranks: Pool, dataset: Path, tmp_path: Path, layout: dict
) -> None:
    config = make_job(dataset, tmp_path / "waiting", **layout)
    ranks.run(run_job, 2, config)
    files = dataclasses.replace(config.checkpoint, save=str(tmp_path / "beside"), asynchronous=True)
    words, error = max(ranks.run(with_slow_disk, 2, dataclasses.replace(config, checkpoint=files)))
    assert not error
    # The checkpoint of step 3 came into being while training continued.
    assert words.index("step 4 ") < words.index("step_00000003 in")
    waits = re.findall(r"checkpoint of step (\d) waited (.+) s until that of step 3 was", words)
    assert len(waits) == 1 and waits[0][0] == str(STEPS) and 1 <= float(waits[0][1]) < 60, words
    for step in ("step_00000003", NEWEST):
        sums = [
            json.loads((tmp_path / run / step / "checksums.json").read_text())
            for run in ("waiting", "beside")
        ]
        shards = [name for name in sums[0] if name.endswith(".distcp")]
        assert shards and all(sums[0][name] == sums[1][name] for name in shards)
