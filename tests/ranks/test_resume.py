"""Saving, resuming, changing the layout, and the next stage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Checkpoint, Config, Health, Logging, Parallel
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, config_for, make_packs

# Two after the checkpoint in the middle: what is wrong with the optimizer shows in the second loss.
STEPS = 5
LAST = f"step_{STEPS:08d}"
PACKS_A_STEP = 2
INTERLEAVED = dict(
    pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, layout="v*2|v|t*2|t"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=8, image_share=0.6, alignment=4)
    return folder


def run_job(config: Config) -> int:
    """Run a whole job as ``pretrain_vlm.py`` does; return the step that it ended at."""
    from megavlm.parallel import backend
    from megavlm.train.inspection import inspect
    from megavlm.train.run_job import run_job
    from megavlm.train.stop_signal import StopRequest

    world = config.parallel.model_parallel_size
    start = inspect(config, max(world, torch.distributed.get_world_size()))
    with StopRequest() as stop:
        stop.limit(config.training.max_hours)
        return run_job(config, backend.start(5), start, None, stop).step


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and moments, whole."""
    from megatron.core import dist_checkpointing

    from megavlm.parallel import backend

    backend.start(5)
    loaded = dist_checkpointing.load_plain_tensors(str(folder / "shards"))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def make_job(
    dataset: Path, save: Path | str, load: Path | str = "", stage: str = "2", **settings
) -> Config:
    """Configure a job of a few steps with a checkpoint in the middle and one at the end, and
    without the speed check, which real commands have in ``test_torchrun.py``; ``settings`` as in
    ``config_for``, and of ``Checkpoint``.
    """
    drop_path = 0.2 if "vision" in settings.get("trainable", EVERYTHING) else 0.0
    settings = dict(drop_path=drop_path, global_batch_size=PACKS_A_STEP) | settings
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    chosen = {name: settings.pop(name) for name in list(settings) if name in names}
    files = Checkpoint(**dict(save=str(save), load=str(load), save_interval=3, keep=0) | chosen)
    config = config_for(dataset, **dict(steps=STEPS) | settings)
    quick = Health(speed_check=False)
    return dataclasses.replace(
        config, stage=stage, checkpoint=files, logging=Logging(interval=1), health=quick
    )


def losses(save: Path) -> list[float]:
    """Read the losses that a run has recorded."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def forget_the_end(save: Path, target: Path) -> None:
    """Make a copy of a run that looks as if it had been killed after its checkpoint of step 3."""
    shutil.copytree(save, target)
    shutil.rmtree(target / LAST)
    (target / "metrics.jsonl").unlink()
    (target / "latest").write_text("step_00000003\n")
    (target / f".growing_{LAST}_0a1b2c3d").mkdir()


def resume_bit_for_bit(
    ranks: Pool, world: int, job: Callable[[Path], Config], folder: Path
) -> dict[str, torch.Tensor]:
    """Run a job to its end, and a copy of it that was killed in the middle; compare the losses of
    the rest and what is saved at the end, and return that.

    Args:
        ranks, world: that run it.
        job: configures a run that saves into a folder of the name ``whole`` or ``killed``.
        folder: where these are made.
    """
    assert ranks.run(run_job, world, job(folder / "whole")) == [STEPS] * world
    forget_the_end(folder / "whole", folder / "killed")
    assert ranks.run(run_job, world, job(folder / "killed")) == [STEPS] * world
    assert losses(folder / "killed") == losses(folder / "whole")[3:]
    [whole], [killed] = (
        ranks.run(saved_tensors, 1, folder / name / LAST) for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys() and any("exp_avg" in key for key in whole)
    for key, tensor in whole.items():
        assert torch.equal(tensor, killed[key]), key
    return whole


PARTLY = ("connector", "vision.encoder.layers.1.*", "language.decoder.layers.[02].*")
TENSOR = dict(tensor_model_parallel_size=2)
PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")


RESUMED = [
    (TENSOR, EVERYTHING),
    (TENSOR | dict(vision="data"), PARTLY),
    (PIPELINE, ("connector",)),
    (dict(context_parallel_size=2), PARTLY),
    (INTERLEAVED, PARTLY),
]
# Two data-parallel ranks resume in the next test, and in test_crash.py.
RESUMED_RARELY = [(dict(), EVERYTHING), (PIPELINE, PARTLY), (INTERLEAVED, ("connector",))]


@pytest.mark.parametrize(("layout", "mask"), RESUMED + (RESUMED_RARELY if asks_for_all() else []))
def test_going_on_equals_no_interruption_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path, layout: dict, mask: tuple[str, ...]
) -> None:
    resume_bit_for_bit(
        ranks, 2, lambda save: make_job(dataset, save, trainable=mask, **layout), tmp_path
    )


def test_a_run_out_of_time_ends_after_a_checkpoint_and_goes_on_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "whole"))
    short = make_job(dataset, tmp_path / "short", max_hours=1e-9)
    # The time is looked at after each logged step, and no evaluation delays the checkpoint.
    late = dataclasses.replace(
        short,
        training=dataclasses.replace(short.training, eval_interval=1),
        data=dataclasses.replace(short.data, valid=str(dataset)),
    )
    assert ranks.run(run_job, 2, late) == [1, 1]
    records = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    assert not [line for line in records if '"valid_loss"' in line and json.loads(line)["step"]]
    assert ranks.run(run_job, 2, short) == [2, 2]
    assert ranks.run(run_job, 2, make_job(dataset, tmp_path / "short")) == [STEPS] * 2
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")


OTHER_LAYOUTS = [
    (1, dict()),
    (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    (4, dict(pipeline_model_parallel_size=4, layout="v|v*2|t|t*2")),
    (4, dict(tensor_model_parallel_size=2, context_parallel_size=2)),
    (2, INTERLEAVED),
]
# Each number of ranks and each kind of parallelism is among those of every day too.
RARE = [
    (2, dict()),
    (2, dict(pipeline_model_parallel_size=2, layout="v|v*2,t*3")),
    (2, dict(tensor_model_parallel_size=2, vision="data")),
]


@pytest.mark.parametrize("mask", [EVERYTHING, PARTLY] if asks_for_all() else [EVERYTHING])
def test_a_checkpoint_goes_on_at_other_layouts(
    ranks: Pool, dataset: Path, tmp_path: Path, mask: tuple[str, ...]
) -> None:
    saved = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, vision="data")
    ranks.run(run_job, 4, make_job(dataset, tmp_path / "whole", trainable=mask, **saved))
    expected = losses(tmp_path / "whole")[3:]
    for number, (world, layout) in enumerate(OTHER_LAYOUTS + (RARE if asks_for_all() else [])):
        save = tmp_path / f"other-{number}"
        forget_the_end(tmp_path / "whole", save)
        ranks.run(run_job, world, make_job(dataset, save, trainable=mask, **layout))
        assert losses(save) == pytest.approx(expected, rel=1e-5)


def test_the_next_stage_takes_the_weights_and_starts_anew(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "one", stage="1", trainable=("connector",)))
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "two", load=tmp_path / "one"))
    [one] = ranks.run(saved_tensors, 1, tmp_path / "one" / LAST)
    [two] = ranks.run(saved_tensors, 1, tmp_path / "two" / "step_00000003")
    assert not any("vision" in key for key in one if key.startswith("optimizer"))
    assert any("vision" in key for key in two if key.startswith("optimizer"))
    # The first update has a learning rate of 0, so the first loss of stage 2 is that of the weights
    # of stage 1.
    assert losses(tmp_path / "two")[0] < losses(tmp_path / "one")[0]
    state = json.loads((tmp_path / "two" / LAST / "state.json").read_text())
    assert (state["step"], state["consumed"], state["stage"]) == (STEPS, PACKS_A_STEP * STEPS, "2")


SOME = ("connector", "language.decoder.layers.[02].*")
MORE = ("vision.encoder.layers.*", "connector", "language.decoder.layers.0.*")


def first_moments(save: Path, step: int) -> dict[str, torch.Tensor]:
    """Read the first moments in a checkpoint, by name of the weight."""
    start = "optimizer.state.exp_avg.model."
    tensors = saved_tensors(save / f"step_{step:08d}").items()
    return {key.removeprefix(start): value for key, value in tensors if key.startswith(start)}


@pytest.mark.parametrize(
    ("world", "layout"),
    [*([RARE[0]] if asks_for_all() else []), OTHER_LAYOUTS[-1]],
)
def test_moments_of_what_both_stages_train_are_kept_when_asked(
    ranks: Pool, dataset: Path, tmp_path: Path, world: int, layout: dict
) -> None:
    second = dict(
        load=tmp_path / "one",
        trainable=MORE,
        drop_path=0.0,
        lr=1e-3,
        warmup_ratio=0.0,
        clip_grad=0.0,
        save_interval=1,
    )
    ranks.run(
        run_job,
        2,
        make_job(
            dataset, tmp_path / "one", stage="1", trainable=SOME, tensor_model_parallel_size=2
        ),
    )
    fresh_run = make_job(dataset, tmp_path / "fresh", **second)
    one_step = dataclasses.replace(fresh_run.training, steps=1)
    ranks.run(run_job, 1, dataclasses.replace(fresh_run, training=one_step))
    ranks.run(
        run_job, world, make_job(dataset, tmp_path / "kept", moments="keep", **second, **layout)
    )
    runs = (("one", STEPS), ("fresh", 1), ("kept", 1))
    [before], [fresh], [kept] = (
        ranks.run(first_moments, 1, tmp_path / run, step) for run, step in runs
    )
    # After the first update: (1 - beta) gradient where fresh, and beta times what was there in
    # addition where kept.
    assert (
        fresh.keys() == kept.keys()
        and before.keys() - kept.keys()
        and kept.keys() - before.keys()
        and before.keys() & kept.keys()
    )
    for key in kept:
        wanted = fresh[key] + (0.9 * before[key] if key in before else 0.0)
        assert torch.allclose(kept[key], wanted, rtol=1e-4, atol=1e-7), key
    # Going on inside the stage needs no checkpoint of the stage before, and is exact.
    forget_the_end(tmp_path / "kept", tmp_path / "killed")
    rarely = second | dict(moments="keep", save_interval=STEPS)
    ranks.run(run_job, world, make_job(dataset, tmp_path / "killed", **rarely, **layout))
    assert losses(tmp_path / "killed") == losses(tmp_path / "kept")[3:]
    [whole], [killed] = (
        ranks.run(saved_tensors, 1, tmp_path / run / LAST) for run in ("kept", "killed")
    )
    assert whole.keys() == killed.keys() and all(
        torch.equal(whole[key], killed[key]) for key in whole
    )


def test_old_checkpoints_go(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    config = make_job(dataset, tmp_path / "run")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, save_interval=1, keep=2)
    )
    ranks.run(run_job, 1, dataclasses.replace(config, parallel=Parallel()))
    kept = sorted(entry.name for entry in (tmp_path / "run").glob("step_*"))
    assert kept == ["step_00000004", LAST]
    assert (tmp_path / "run" / "latest").read_text().strip() == kept[-1]
    assert not list((tmp_path / "run").glob(".growing*"))


def test_the_checkpoint_with_the_lowest_held_out_loss_stays(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run", lr=0.05, save_interval=1, keep=1, keep_best=1)
    training = dataclasses.replace(config.training, eval_interval=1, eval_packs=2)
    config = dataclasses.replace(
        config, training=training, data=dataclasses.replace(config.data, valid=str(dataset))
    )
    ranks.run(run_job, 1, config)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    found = {
        line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line and line["step"]
    }
    best = min(found, key=found.get)
    kept = sorted(
        int(entry.name.removeprefix("step_")) for entry in (tmp_path / "run").glob("step_*")
    )
    assert len(found) == STEPS and kept == sorted({best, STEPS})
    state = json.loads((tmp_path / "run" / f"step_{best:08d}" / "state.json").read_text())
    assert state["valid_loss"] == pytest.approx(found[best])


def run_with_a_signal(config: Config) -> tuple[int, bool]:
    """Run a job, of which one rank was told to stop before it began."""
    from megavlm.parallel import backend
    from megavlm.train.inspection import inspect
    from megavlm.train.run_job import run_job
    from megavlm.train.stop_signal import StopRequest

    start = inspect(config, torch.distributed.get_world_size())
    stop = StopRequest()
    if torch.distributed.get_rank() == 1:
        stop._remember(signal.SIGTERM, None)
    state = run_job(config, backend.start(5), start, None, stop)
    return state.step, stop.is_agreed


def test_a_signal_that_came_with_the_last_step_is_known_to_all(
    dataset: Path, ranks: Pool, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run")
    data = dataclasses.replace(config.data, valid=str(dataset))
    config = dataclasses.replace(config, logging=Logging(interval=STEPS), data=data)
    assert ranks.run(run_with_a_signal, 2, config) == [(STEPS, True), (STEPS, True)]
    # Who asks to stop while the run is built does not wait for an evaluation before the first step.
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [STEPS]
