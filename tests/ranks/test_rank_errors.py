"""What happens to one rank ends all of them at once, in the same words."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megavlm.checkpoint import base_files, rank_errors
from megavlm.checkpoint.rank_errors import RankError, gather_errors
from megavlm.config.schema import Config
from megavlm.train import resume
from megavlm.train.inspection import inspect
from megavlm.train.resume import DamagedError
from megavlm.train.stop_signal import StopRequest
from tests.ranks.pool import Pool
from tests.ranks.test_damage import NEWEST, told
from tests.ranks.test_damage import dataset as dataset
from tests.ranks.test_damage import whole as whole
from tests.ranks.test_resume import make_job

ERROR = "[Errno 5] Input/output error"
TOLD = f"OSError: {ERROR}"


def fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def on_rank(
    number: int, name: str, action: Callable[..., Any] = fail
) -> contextlib.AbstractContextManager:
    """Let a function fail on one rank, or do something else."""
    return mock.patch(name, action) if dist.get_rank() == number else contextlib.nullcontext()


def run_on_failing_disk(config: Config, name: str) -> str:
    """Run a job in which a function fails on rank 0; return the error that this rank ends with."""
    with on_rank(0, f"megavlm.train.{name}"):
        return told(config)[1]


@pytest.mark.parametrize(
    "name",
    [
        "run_job.directory.clean",
        "build_job.initial_weights.find_unused",
        "saver._files_of_dataset",
    ],
)
def test_what_rank_0_alone_reads_is_no_wait_for_others(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    config = make_job(dataset, tmp_path / "run", steps=9)
    assert ranks.run(run_on_failing_disk, 2, config, name) == [f"rank 0: {TOLD}"] * 2


def fail_in_code(config: Config, number: int, name: str) -> tuple[str, str]:
    """Run a job with a mistake that one rank alone meets; return what this rank printed, and the
    error that it ends with.
    """

    def mistake(*_: object) -> None:
        raise KeyError("no such name")

    with on_rank(number, f"megavlm.train.{name}", mistake):
        return told(config)


def test_a_mistake_in_the_code_that_one_rank_meets_is_no_wait_for_others(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run", steps=1)
    found = ranks.run(fail_in_code, 2, config, 1, "build_job.open_tasks")
    assert [error for _, error in found] == ["rank 1: KeyError: 'no such name'"] * 2
    assert ["in mistake" in printed for printed, _ in found] == [False, True]


def test_a_mistake_where_a_checkpoint_is_published_is_no_wait_for_others(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run", steps=1)
    for _, error in ranks.run(fail_in_code, 2, config, 0, "saver.Saver._publish"):
        assert "rank 0: KeyError: 'no such name'" in error


def leaves(config: Config, error: Exception | None) -> bool:
    """Run a job that ends with an error, or well; return whether this rank took leave of the
    others, for which NCCL waits until they do so too.
    """
    from megavlm.train import launch

    with (
        mock.patch.object(launch, "run_job", side_effect=error),
        mock.patch.object(launch.backend, "stop") as stop,
        contextlib.suppress(SystemExit, RuntimeError),
    ):
        launch.launch(config, StopRequest(), store=launch.backend.meet(5))
    return stop.called


@pytest.mark.parametrize(
    ("error", "is_left"),
    [
        (None, True),
        (RankError("rank 1: full"), True),
        (RuntimeError("a mistake of this rank"), False),
        (OSError(5, "Input/output error", "packs/0.bin"), False),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(
    ranks: Pool, dataset: Path, tmp_path: Path, error: Exception | None, is_left: bool
) -> None:
    config = make_job(dataset, tmp_path / "run", steps=1)
    assert ranks.run(leaves, 1, config, error) == [is_left]


def look_on_failing_disk(config: Config) -> str:
    """Find the checkpoint to load, of which rank 0 cannot look for the one before a damaged one."""
    first = inspect(config, 1)
    with on_rank(0, "megavlm.train.resume.directory.candidates"):
        try:
            resume.find_undamaged(config, first)
        except DamagedError as error:
            return str(error)
    return ""


def test_no_checkpoint_before_a_damaged_one_can_be_looked_for(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / NEWEST / "shards/__0_0.distcp").unlink()
    config = make_job(dataset, tmp_path / "run")
    assert ranks.run(look_on_failing_disk, 2, config) == [ERROR] * 2


def run_on_disk_that_fails_late(config: Config) -> str:
    """Run a job whose checkpoint is whole when it is checked, and whose shards rank 1 cannot read
    then.
    """
    name = "megatron.core.dist_checkpointing.strategies.torch.MCoreLoadPlanner.resolve_tensor"
    with on_rank(1, name):
        return told(config)[1]


def test_a_rank_that_cannot_read_its_shards_is_named_by_all(
    ranks: Pool, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    config = make_job(dataset, tmp_path / "run", steps=9)
    for error in ranks.run(run_on_disk_that_fails_late, 2, config):
        assert f"{tmp_path / 'run' / NEWEST}/shards: cannot be loaded: rank 1: " in error
        assert ERROR in error


def note_files(folder: Path) -> tuple[str, str]:
    """Note base weights of which rank 1 cannot read its share; gather errors of all ranks."""
    from megavlm.parallel import backend

    backend.start(5)
    error = ""
    with on_rank(1, "megavlm.checkpoint.base_files.checksums.measure"):
        try:
            base_files.note([folder], folder, by_size_only=False)
        except RankError as found:
            error = str(found)
    return error, gather_errors("" if dist.get_rank() == 1 else "full")


def gather_many() -> list[str]:
    """Gather an error that all ranks have, and one that each has for itself, whole and cut."""
    from megavlm.parallel import backend

    backend.start(5)
    own = f"/run/__{dist.get_rank()}_0.distcp: {ERROR}"
    found = [gather_errors(ERROR), gather_errors(own)]
    with mock.patch.object(rank_errors, "_MOST_SHOWN", 2):
        return [*found, gather_errors(own)]


def test_of_many_errors_the_first_are_told(ranks: Pool) -> None:
    each = [f"rank {rank}: /run/__{rank}_0.distcp: {ERROR}" for rank in range(4)]
    told = [f"rank 0: {ERROR}", "; ".join(each), "; ".join([*each[:2], "and 2 more"])]
    assert ranks.run(gather_many, 4) == [told] * 4


def test_files_of_base_weights_that_one_rank_cannot_read(ranks: Pool, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.safetensors").touch()
    found = ranks.run(note_files, 3, tmp_path)
    assert found == [(f"rank 1: {TOLD}", "rank 0: full")] * 3
