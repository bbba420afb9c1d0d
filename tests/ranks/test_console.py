"""What one rank alone knows is printed, also where another one writes the console: with pipeline
parallelism the writing rank is on the last stage, and rank 0 keeps the save folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
import torch.distributed as dist

from megavlm.checkpoint.lock import FILE_NAME, held
from megavlm.config.schema import Config, Profile
from megavlm.parallel import backend
from megavlm.train.inspection import inspect
from megavlm.train.run_job import run_job
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_rank_errors import on_rank
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
        run_job(config, backend.start(5), start, lock)
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
