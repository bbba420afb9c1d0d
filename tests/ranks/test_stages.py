"""Several stages in one command: killed in one and started again, with a damaged checkpoint, and
refused before the first one starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megavlm.config.cli import to_yaml
from megavlm.config.schema import Checkpoint, Config, Eval, Logging
from megavlm.config.stages import parse_stages
from tests.ranks import commands
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs
from tests.ranks.test_resume import saved_tensors
from tests.ranks.test_torchrun import ENVIRONMENT, TORCHRUN, _trained_steps, _wait_for_step

ENDS = ("stage_1.5/step_00000010", "stage_2/step_00000002")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Make packs; return the options of a command without its save folder."""
    folder = tmp_path_factory.mktemp("stages")
    for name, packs in (("1", 6), ("2", 8)):
        make_packs(folder / f"packs_{name}", packs=packs, image_share=0.7)
    config = config_for(folder / "packs_1", steps=2, global_batch_size=2)
    config = dataclasses.replace(
        config, checkpoint=Checkpoint(save="runs", save_interval=2), logging=Logging(interval=1)
    )
    (folder / "run.yaml").write_text(to_yaml(config))
    return [
        *("--config", str(folder / "run.yaml"), "--stage", "1,1.5,2"),
        *("--training.max_hours", "100"),
        *("--for", "1", "--training.trainable connector"),
        *("--for", "1.5", f"--data.train {folder / 'packs_2'} --training.steps 10"),
    ]


def run_stages(runs: list[Config]) -> str:
    """Run stages as ``pretrain_vlm.py`` does, in one process; return what was told."""
    from megavlm.train.stages import launch_all

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.suppress(SystemExit):
        launch_all(runs)
    return shown.getvalue()


def stages(arguments: list[str], save: Path) -> list[Config]:
    whole = [*arguments, "--checkpoint.save", str(save)]
    return parse_stages(whole, lambda *_: None, lambda *_: ())


@pytest.fixture(scope="module")
def undisturbed(
    ranks: Pool, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ranks.run(run_stages, 1, stages(arguments, save)) == [""]
    return save


def assert_equal_ends(ranks: Pool, one: Path, other: Path) -> None:
    for stage in ENDS:
        [expected], [found] = (ranks.run(saved_tensors, 1, save / stage) for save in (one, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), stage


def start(program: list[str], arguments: list[str], output: Path) -> psutil.Process:
    """Start ``pretrain_vlm.py`` under torchrun, or without if ``program`` is empty."""
    if not program:
        [alone] = commands.start([arguments], output)
        return psutil.Process(alone.pid)
    return psutil.Popen(
        [*program, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def run(program: list[str], arguments: list[str], output: Path) -> str:
    done = (
        subprocess.run(
            [*program, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        if program
        else commands.run([arguments], output)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", [[], TORCHRUN] if asks_for_all() else [[]])
def test_stages_that_were_killed_and_started_again_end_bit_for_bit_alike(
    ranks: Pool, arguments: list[str], undisturbed: Path, tmp_path: Path, program: list[str]
) -> None:
    if program == TORCHRUN:
        undisturbed = tmp_path / "whole"
        run(program, [*arguments, "--checkpoint.save", str(undisturbed)], tmp_path / "told")
    killed = tmp_path / "killed"
    command = [*arguments, "--checkpoint.save", str(killed)]
    job = start(program, command, tmp_path / "first")
    try:
        _wait_for_step(killed / "stage_1.5" / "metrics.jsonl", 3)
    finally:
        for process in [job, *job.children(recursive=True)]:  # ranks have sessions of their own
            process.kill()
        job.wait()
    assert not (killed / "stage_2").exists()
    again = run(program, command, tmp_path / "again")
    # The first stage is not built again; the second resumes; the third starts from it.
    assert "stage 1," not in again and "resuming after step" in again
    assert f"start: {killed / ENDS[0]} (stage 1.5, step 10): its weights" in again
    assert _trained_steps(killed / "stage_2" / "metrics.jsonl") == [1, 2]
    assert_equal_ends(ranks, undisturbed, killed)


def test_a_stage_whose_last_checkpoint_is_damaged_resumes_from_the_one_before(
    ranks: Pool, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"  # all of it has moved
    shutil.copytree(undisturbed, save)
    shutil.rmtree(save / "stage_2")
    shard = max((save / ENDS[0] / "shards").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    [told] = ranks.run(run_stages, 1, stages(arguments, save))
    assert "the checksum differs" in told and shard.name in told
    assert "stage 1.5 resumes from the checkpoint before" in told
    assert "the run resumes from step_00000008" in told
    assert_equal_ends(ranks, undisturbed, save)


def test_a_stage_that_has_begun_does_not_need_the_one_before_it(
    ranks: Pool, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Earlier stages are what is removed from a disk that is full."""
    shutil.copytree(undisturbed / "stage_2", tmp_path / "run" / "stage_2")
    assert ranks.run(run_stages, 1, stages(arguments, tmp_path / "run")) == [""]


def test_new_steps_of_a_stage_behind_which_another_has_begun_are_told(
    arguments: list[str],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from megavlm.train.stages import describe_start, launch_all

    runs = stages([*arguments[:-1], arguments[-1].removesuffix("10") + "12"], undisturbed)
    state = SimpleNamespace(step=12)
    monkeypatch.setattr("megavlm.train.stages.launch", lambda *_, **__: state)
    launch_all(runs)
    told = (
        "stage 1.5 is at step 10 of 12 and stays so, since a later one has begun; to train it on,"
        f" move {undisturbed / 'stage_2'} and those of the stages behind it away"
    )
    assert capsys.readouterr().err == f"WARNING: {told}\n"
    assert describe_start(runs).endswith(f"\n{told}")
    launch_all(stages(arguments, undisturbed))
    assert capsys.readouterr().err == ""


def test_a_signal_ends_an_evaluation_at_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.train.stages import launch_all

    heard = []

    def launch(*_: object, **__: object) -> None:
        heard.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr("megavlm.train.stages.launch", launch)
    launch_all([dataclasses.replace(stages(arguments, tmp_path)[0], eval=Eval(only=True))])
    assert heard == [signal.getsignal(signal.SIGTERM)]


def test_ranks_with_other_commands_meet_to_compare_them(
    arguments: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 runs all stages, and comes first; others evaluate, or know fewer stages."""
    from megavlm.train import stages as of_command

    shutil.copytree(undisturbed, tmp_path / "run")
    runs = stages(arguments, tmp_path / "run")
    store = torch.distributed.HashStore()
    met = []

    def launch(*_: object, store: torch.distributed.Store, **__: object) -> SimpleNamespace:
        store.add("ranks", 1)
        met.append(store.add("ranks", 0))
        return SimpleNamespace(step=0)

    monkeypatch.setattr(of_command, "launch", launch)
    monkeypatch.setattr(of_command.backend, "meet", lambda _: store)
    commands_of_ranks = (runs, [dataclasses.replace(runs[0], eval=Eval(only=True))], runs[:1])
    for rank, command in enumerate(commands_of_ranks):
        monkeypatch.setenv("RANK", str(rank))
        of_command.launch_all(command)
    assert met == [1, 2, 3]


def test_each_run_of_a_command_has_keys_of_its_own(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.train import stages as of_command

    told = []

    def launch(run: Config, *_: object, store: torch.distributed.Store, **__: object) -> object:
        told.append(store.add("runs", 1))
        return SimpleNamespace(step=run.training.steps)

    monkeypatch.setattr(of_command, "launch", launch)
    of_command.launch_all(stages(arguments, tmp_path / "run"))
    assert told == [1, 1, 1]


def test_a_stage_goes_back_to_the_one_before_it_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start is damaged, and what the one before it then saves is, too."""
    from megavlm.train import stages as of_command
    from megavlm.train.resume import DamagedError

    begun = []

    def launch(run: Config, *_: object, can_go_back: bool, **__: object) -> object:
        begun.append((run.stage, can_go_back))
        if run.stage == "2":
            raise DamagedError("damaged") if can_go_back and len(begun) < 9 else SystemExit(2)
        return SimpleNamespace(step=run.training.steps)

    monkeypatch.setattr(of_command, "launch", launch)
    with pytest.raises(SystemExit):
        of_command.launch_all(stages(arguments, tmp_path / "run"))
    assert begun == [("1", False), ("1.5", True), ("2", True), ("1.5", False), ("2", False)]


def test_a_save_folder_that_rank_0_cannot_read_is_told_to_all(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.train import stages as of_command

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def launch(*_: object, ahead: object, **__: object) -> None:
        with pytest.raises(ValueError, match="--checkpoint.save .*/run: cannot be read"):
            ahead()  # before all ranks compare what they found
        raise SystemExit(2)

    monkeypatch.setattr(of_command, "launch", launch)
    monkeypatch.setattr(of_command.resume, "has_begun", fail)
    with pytest.raises(SystemExit):
        of_command.launch_all(stages(arguments, tmp_path / "run"))


def test_a_stage_that_is_done_is_not_built_again(
    arguments: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.train import stages as of_command

    begun = []

    def launch(run: Config, *_: object, **__: object) -> object:
        begun.append(run.stage)
        return SimpleNamespace(step=run.training.steps)

    monkeypatch.setattr(of_command, "launch", launch)
    for stage in ("1", "1.5", "2"):
        shutil.copytree(undisturbed / f"stage_{stage}", tmp_path / f"run/stage_{stage}")
        of_command.launch_all(stages(arguments, tmp_path / "run"))
    assert begun == ["1.5", "2", "2", "2"]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_stage_with_checkpoints_of_its_own_does_not_go_back(
    undisturbed: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    is_own: bool,
) -> None:
    from megavlm.checkpoint.step_folder import find
    from megavlm.train import launch as of_run
    from megavlm.train.resume import DamagedError
    from megavlm.train.stop_signal import StopRequest

    before, run = stages(arguments, undisturbed)[1:]
    start = find((run if is_own else before).checkpoint.save)

    def run_job(*_: object) -> None:
        raise DamagedError("no checkpoint can be used")

    monkeypatch.setattr(of_run, "agree_to_start", lambda *_: (start, None))
    monkeypatch.setattr(of_run, "run_job", run_job)
    for name in ("start", "stop"):
        monkeypatch.setattr(of_run.backend, name, lambda *_, **__: None)
    with pytest.raises(SystemExit if is_own else DamagedError):
        of_run.launch(run, StopRequest(), store=torch.distributed.HashStore(), can_go_back=True)
    told = "error: no checkpoint can be used\n" if is_own else ""
    assert capsys.readouterr().err == told


def test_a_later_stage_that_could_not_run_is_refused_before_the_first_starts(
    ranks: Pool, arguments: list[str], tmp_path: Path
) -> None:
    make_packs(tmp_path / "other", packs=4, image_share=0.7, vocab_size=198)
    for own, why in (
        ("--architecture.lora.rank 4 --training.trainable connector", "stage 2: --architecture"),
        (f"--data.train {tmp_path / 'other'}", "stage 2: --data.train"),
    ):
        first = ["--for", "1.5", "--architecture.lora.rank 8 --training.trainable connector"]
        save = tmp_path / "run"
        [told] = ranks.run(run_stages, 1, stages([*arguments, *first, "--for", "2", own], save))
        assert "a later stage could not run" in told and why in told
        assert not save.exists()


def test_what_one_rank_alone_finds_in_a_later_stage_is_told_by_all(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Rank 1 does not see the checkpoint of stage 1 either, as through a cache of NFS; which stage
    comes first is rank 0's to say.
    """
    make_packs(tmp_path / "other", packs=4, image_share=0.7, vocab_size=198)
    shutil.copytree(undisturbed / "stage_1", tmp_path / "run" / "stage_1")
    usual = [*arguments, "--checkpoint.save", str(tmp_path / "run")]
    of_rank_1 = ["--for", "2", f"--data.train {tmp_path / 'other'}"]
    stale = [*arguments, "--checkpoint.save", str(tmp_path / "stale"), *of_rank_1]
    done = commands.run([usual, stale], tmp_path / "told")
    assert done.returncode != 0
    assert done.stderr.count("a later stage could not run") == 1, done.stderr
    assert "error: rank 1 (" in done.stderr and "packed with another tokenizer" in done.stderr
    started = [path.name for path in (tmp_path / "run").iterdir()]
    assert started == ["stage_1"], "nothing else has"
