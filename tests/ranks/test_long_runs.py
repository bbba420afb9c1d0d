"""Steps that are skipped, signals that ask for a checkpoint, checkpoints by epoch, and profiles."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from megavlm.checkpoint.train_state import State
from megavlm.config.schema import BadSteps, Config, Profile
from megavlm.train.bad_steps import BadStepRule, StepError
from megavlm.train.stop_signal import StopRequest
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_resume import PACKS_A_STEP, make_job, run_job, saved_tensors

PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.6, alignment=4)
    return folder


def run_planted(config: Config, factors: dict[int, float], signals: tuple[int, ...] = ()) -> str:
    """Run a job whose loss is multiplied by a factor in some steps, on the last data-parallel rank
    alone; return what it printed.

    Args:
        config: the job.
        factors: of steps, by their numbers on the console.
        signals: steps at which the last rank gets SIGUSR1.
    """
    from megavlm.train import loop
    from megavlm.train import step as steps

    now: list[int] = []
    plain_loss = steps.weighted_sum
    plain_step = loop._step

    def planted(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return plain_loss(losses, weights) * factors.get(now[-1], 1.0)

    def counted(job, state, *arguments):
        rank = job.groups.data_rank
        is_planted = rank == job.groups.data_size - 1 and state.step + 1 in factors
        now.append(state.step + 1 if is_planted else 0)
        if state.step + 1 in signals and job.groups.rank == job.groups.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain_step(job, state, *arguments)

    shown = io.StringIO()
    with (
        mock.patch.object(steps, "weighted_sum", planted),
        mock.patch.object(loop, "_step", counted),
        contextlib.redirect_stdout(shown),
    ):
        run_job(config)
    return shown.getvalue()


def tensors_of(ranks: Pool, save: Path, step: int) -> dict[str, torch.Tensor]:
    [found] = ranks.run(saved_tensors, 1, save / f"step_{step:08d}")
    return {key: value for key, value in found.items() if not key.endswith("rng_state")}


def forget_after(step: int, save: Path, target: Path) -> None:
    """Copy a run as if it had been killed after its checkpoint of a step."""
    shutil.copytree(save, target)
    (target / "latest").write_text(f"step_{step:08d}\n")
    for later in [later for later in saved_steps(target) if later > step]:
        shutil.rmtree(target / f"step_{later:08d}")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def job_with_rules(dataset: Path, save: Path, **layout) -> Config:
    """Configure a job with all rules, a checkpoint in the middle and one at the end."""
    rising = dict(drop_path=0.1, drop_path_schedule="linear", end_drop_path=0.6)
    config = make_job(dataset, save, steps=6, **rising, **layout)
    rules = BadSteps(skip=True, spike_factor=1.5, spike_action="skip", window=4)
    files = dataclasses.replace(config.checkpoint, save_epochs=1)
    profile = Profile(folder=f"{save}_traces", first_step=2, step_count=2, memory=True)
    return dataclasses.replace(config, checkpoint=files, bad_steps=rules, profile=profile)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, dict()), (2, PIPELINE), (4, PIPELINE)] if asks_for_all() else [(4, PIPELINE)],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")] if asks_for_all() else [float("nan")])
def test_a_bad_step_is_skipped_on_all_ranks_and_the_run_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path, world: int, layout: dict, bad: float
) -> None:
    config = job_with_rules(dataset, tmp_path / "whole", **layout)
    planted = {2: bad, 3: bad, 5: 10.0}
    shown = "".join(ranks.run(run_planted, world, config, planted, (2,)))
    for step in (2, 3):
        assert shown.count(f"WARNING: step {step} is skipped: its loss is {bad}") == 1, shown
    assert shown.count("WARNING: step 5 is skipped: its loss") == 1, shown
    assert "the median of the last 2 steps" in shown  # 1 and 4
    assert ".jsonl:" in shown  # where the packs come from
    # Step 2 was saved at a signal, 3 and 6 by the interval, and step 5 ends an epoch.
    assert saved_steps(tmp_path / "whole") == [2, 3, 5, 6]
    assert PACKS_A_STEP * 5 == 10
    second, third, last = (tensors_of(ranks, tmp_path / "whole", step) for step in (2, 3, 6))
    assert are_equal(second, third) and not are_equal(third, last)
    assert all(value.isfinite().all() for value in last.values())
    state = json.loads((tmp_path / "whole" / "step_00000006" / "state.json").read_text())
    assert (state["step"], state["skipped"], state["skipped_in_a_row"]) == (6, 3, 0)
    for rank in range(world):
        check_trace(tmp_path / "whole_traces" / f"steps_2_to_3_rank_{rank}.json.gz")
    # The median and the counts of the steps before are known after a resume.
    forget_after(3, tmp_path / "whole", tmp_path / "killed")
    config = job_with_rules(dataset, tmp_path / "killed", **layout)
    shown = "".join(ranks.run(run_planted, world, config, planted))
    assert shown.count("WARNING: step 5 is skipped: its loss") == 1, shown
    assert shown.count("WARNING: --profile.first_step 2: step 3 is done already") == 1, shown
    assert are_equal(last, tensors_of(ranks, tmp_path / "killed", 6))


def saved_steps(save: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("step_")) for entry in save.glob("step_*"))


def check_trace(path: Path) -> None:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("aten::mm") > 10 and "[memory]" in names


def test_too_many_skipped_steps_end_the_run(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    config = make_job(dataset, tmp_path / "run")
    config = dataclasses.replace(config, bad_steps=BadSteps(skip=True, most_in_a_row=2))
    told = r"step 5: 2 steps in a row were skipped \(--bad_steps.most_in_a_row 2\)"
    with pytest.raises(AssertionError, match=told):
        ranks.run(run_planted, 1, config, dict.fromkeys((2, 4, 5), float("nan")))
    assert (tmp_path / "run" / "latest").read_text() == "step_00000003\n"


def judge(rules: BadSteps, losses: list[float]) -> tuple[list[bool], State, list[str]]:
    """Return which steps are skipped, what a checkpoint remembers, and what was said."""
    config = dataclasses.replace(make_job(Path(), Path()), bad_steps=rules)
    job = mock.Mock(config=config)
    job.groups.from_writer = lambda value, device: value
    job.groups.sum_over_data = lambda value: value
    job.groups.rank = 0
    job.train.origins = lambda pack: [f"a.jsonl:{pack}"]
    metrics = mock.Mock()
    rule = BadStepRule(job, State(), metrics)
    skipped = []
    with mock.patch.object(torch.distributed, "broadcast_object_list"):
        for step, loss in enumerate(losses, start=1):
            skipped.append(rule.skips(step, [step], torch.tensor(loss), torch.tensor(1.0)))
            rule.check_limits(step)
    return skipped, rule.after(State()), [call.args[0] for call in metrics.log.call_args_list]


def test_spikes_are_warned_of_or_skipped_and_a_limit_holds_for_all_of_them() -> None:
    losses = [1.0, 8.0, 2.0, 1.0, 7.0, 1.0]
    rules = dict(spike_factor=3.0, window=4)
    skipped, state, said = judge(BadSteps(**rules), losses)
    # Step 2 comes too early to be judged; then the median of 1, 8, 2, 1 is 1.5.
    assert skipped == [False] * 6 and state.skipped == 0
    assert state.recent_losses == (2.0, 1.0, 7.0, 1.0)
    assert len(said) == 1 and "step 5 is a spike: its loss 7 is more than 3 times 1.5" in said[0]
    assert "a.jsonl:5" in said[0]
    skipped, state, said = judge(BadSteps(spike_action="skip", **rules), losses)
    assert skipped == [False, False, False, False, True, False]
    assert state.skipped == 1 and state.recent_losses == (8.0, 2.0, 1.0, 1.0)
    with pytest.raises(StepError, match=r"step 5: 1 steps in all were skipped"):
        judge(BadSteps(spike_action="skip", most=1, **rules), losses)
    with pytest.raises(StepError, match=r"step 3: its loss is nan.*--bad_steps.skip true"):
        judge(BadSteps(**rules), [1.0, 1.0, float("nan")])


def test_a_signal_that_asks_for_a_checkpoint_where_none_are_kept_is_answered(
    ranks: Pool, dataset: Path
) -> None:
    config = make_job(dataset, "", steps=3, save_interval=0)
    shown = "".join(ranks.run(run_planted, 2, config, {}, (2,)))
    told = "WARNING: SIGUSR1 asked for a checkpoint, and nothing is kept without --checkpoint.save"
    assert shown.count(told) == 1, shown


def step_error_of(config: Config) -> str:
    """Run a job that ends with a ``StepError``, which is told without a traceback; return it."""
    with pytest.raises(StepError) as caught:
        run_job(config)
    return str(caught.value)


def test_validation_packs_without_a_label_end_the_run_in_words(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    valid = tmp_path / "valid"
    make_packs(valid, packs=3, image_share=0.0, text_tokens=(1, 2), alignment=4)
    config = make_job(dataset, "", steps=1, save_interval=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid=str(valid)))
    told = f"--data.valid {valid}: no token of its first 3 packs is supervised, so there is no loss"
    assert ranks.run(step_error_of, 2, config) == [told, told]


def run_out_of_memory(config: Config) -> str:
    """Run a job that runs out of memory; return what it says."""
    from megavlm.train import launch

    shown = io.StringIO()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    with (
        mock.patch.object(launch, "run_job", side_effect=error),
        mock.patch.object(launch.backend, "stop"),
        contextlib.redirect_stderr(shown),
        contextlib.suppress(SystemExit),
    ):
        launch.launch(config, StopRequest(), store=launch.backend.meet(5))
    return shown.getvalue()


def test_a_rank_without_memory_names_the_options_that_save_it(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = make_job(dataset, tmp_path / "run")
    config = dataclasses.replace(config, model="internvl2_5-8b")
    [said] = ranks.run(run_out_of_memory, 1, config)
    assert "out of memory on rank 0 (" in said and "Tried to allocate 2.00 GiB." in said
    assert "\nmore" not in said and "--parallel.recompute selective, or full" in said
    assert "python tools/plan_parallel.py --recipe internvl --model internvl2_5-8b" in said
