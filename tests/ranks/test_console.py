"""What one rank alone knows is printed, also where another one writes the console: with pipeline
parallelism the writing rank is on the last stage, and rank 0 keeps the save folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megavlm.checkpoint.lock import FILE_NAME, held
from megavlm.checkpoint.train_state import State
from megavlm.config.schema import BadSteps, Config, Profile
from megavlm.data.loading.dataset import PackedDataset
from megavlm.parallel import backend
from megavlm.train.bad_steps import BadStepRule, StepError
from megavlm.train.inspection import inspect
from megavlm.train.metrics import Metrics
from megavlm.train.run_job import run_job
from megavlm.train.stop_signal import StopRequest
from tests.ranks.pool import Pool
from tests.ranks.runs import build, make_packs
from tests.ranks.test_rank_errors import ERROR, fail, on_rank
from tests.ranks.test_resume import make_job

PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.6)
    return folder


def printed_by(config: Config) -> str:
    """Run a job whose lock somebody removes each time that rank 0 fails to remove checkpoints;
    return what this rank printed.
    """
    save = Path(config.checkpoint.save)

    def refuse(*_: object) -> None:
        (save / FILE_NAME).unlink()
        raise PermissionError("in use")

    start = inspect(config, dist.get_world_size())
    shown = io.StringIO()
    with (
        held(save) if dist.get_rank() == 0 else contextlib.nullcontext() as lock,
        on_rank(0, "megavlm.train.saver.directory.drop_old", refuse),
        contextlib.redirect_stdout(shown),
    ):
        run_job(config, backend.start(5), start, lock, StopRequest())
    return shown.getvalue()


def test_what_rank_0_finds_in_the_save_folder_is_told_at_any_layout(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run", steps=2, save_interval=1, keep=1, **PIPELINE)
    profile = Profile(folder=str(tmp_path / "traces"), first_step=1, step_count=1, ranks=(0,))
    shown = "".join(ranks.run(printed_by, 2, dataclasses.replace(config, profile=profile)))
    assert shown.count("WARNING: --checkpoint.keep 1: older checkpoints of") == 2, shown
    assert shown.count(f"somebody removed {FILE_NAME}") == 1, shown
    assert shown.count("profile: traces of steps 1 to 1 are in") == 1, shown
    assert shown.count("step 2 of 2") == 1, shown


def judged(config: Config, is_broken: bool) -> tuple[str, str]:
    """Judge a step whose loss is not finite on packs 1 and 2, which is skipped, and then one that
    is not; return what this rank printed of the first, and the error of the second.

    Args:
        config: the run.
        is_broken: whether pack 1 cannot be read.
    """
    job = build(config)
    shown = io.StringIO()
    loss = torch.tensor(float("nan"))
    origins = PackedDataset.origins

    def failing(dataset: PackedDataset, pack: int) -> list[str]:
        return fail() if pack == 1 else origins(dataset, pack)

    with (
        mock.patch.object(PackedDataset, "origins", failing)
        if is_broken
        else contextlib.nullcontext(),
        contextlib.redirect_stdout(shown),
        Metrics(config, job.groups.is_writer) as metrics,
    ):
        rule = BadStepRule(job, State(), metrics)
        rule.skips(3, [1, 2], loss, torch.tensor(1.0))
        rule.settings = BadSteps(spike_factor=2.0)
        with pytest.raises(StepError) as error:
            rule.skips(4, [1, 2], loss, torch.tensor(1.0))
    return shown.getvalue(), str(error.value)


@pytest.mark.parametrize("is_broken", [False, True])
def test_records_of_a_bad_step_are_named_on_the_console_and_in_the_error(
    ranks: Pool, dataset: Path, is_broken: bool
) -> None:
    config = dataclasses.replace(
        make_job(dataset, "", **PIPELINE), bad_steps=BadSteps(skip=True, most=9)
    )
    (first, told), (last, same) = ranks.run(judged, 2, config, is_broken)
    packs = PackedDataset(dataset)
    first_pack, others = (", ".join(packs.origins(pack)[:2]) for pack in (1, 2))
    named = f"{first_pack}; {others}"
    if is_broken:
        named = f"records of pack 1 cannot be read: {ERROR}; {others}"
    assert first == "" and last.count(f"packs [1, 2] ({named})") == 1, last
    assert told == same and f"on packs [1, 2] ({named}); to skip" in told, told
