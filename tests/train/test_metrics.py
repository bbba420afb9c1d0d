"""What a run tells: console, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavlm.config.models import MODELS
from megavlm.config.schema import Checkpoint, Logging
from megavlm.planner.flops import training_cost
from megavlm.train.meters import Clock, Meter, collect_reports
from megavlm.train.metrics import Metrics
from megavlm.train.supply import Supply
from megavlm.train.throughput import STEP_SECONDS, Throughput
from tests.ranks.runs import config_for


def _config(tmp_path: Path, **logging):
    return dataclasses.replace(
        config_for(tmp_path),
        checkpoint=Checkpoint(save=str(tmp_path / "run")),
        logging=Logging(**logging),
    )


def test_records_go_to_the_console_and_to_a_file_that_a_restart_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for step in (1, 2):
        with Metrics(_config(tmp_path), is_writer=True) as metrics:
            metrics.record(step, {"loss": 2.5 / step, "grad_norm": float("inf")})
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [
        (1, 2.5, None),
        (2, 1.25, None),
    ]
    assert "step 2 of 10  loss 1.25" in capsys.readouterr().out


def test_figures_of_sources_go_to_the_file_and_of_few_sources_to_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = {"chats": 1.25, "web": float("nan")}
    many = {f"source-{place}": 1.0 for place in range(7)}
    with Metrics(_config(tmp_path), is_writer=True) as metrics:
        metrics.record(1, {"loss": 2.5}, {"loss": few, "loss_part": {"chats": 0.5}})
        metrics.record(2, {"loss": 2.5}, {"loss": many})
        metrics.record(3, {"loss": 2.5}, {"loss": {"chats": 1.25}})
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        lines[0].items()
        >= {"loss": 2.5, "loss/chats": 1.25, "loss/web": None, "loss_part/chats": 0.5}.items()
    )
    assert lines[1]["loss/source-6"] == 1.0 and lines[2]["loss/chats"] == 1.25
    assert capsys.readouterr().out.splitlines() == [
        "step 1 of 10  loss 2.5  loss of chats 1.25, web nan",
        "step 2 of 10  loss 2.5",
        "step 3 of 10  loss 2.5",
    ]


def test_a_full_disk_costs_records_but_no_run_and_leaves_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(_config(tmp_path), is_writer=True) as metrics:
        metrics.record(1, {"loss": 2.5})
        size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            metrics.record(2, {"loss": 1.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.record(3, {"loss": 0.5})
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 3]
    assert "metrics.jsonl: the record above is on the console only" in capsys.readouterr().out


@pytest.mark.parametrize("left", ['{"step": 2, "lo', "\0" * 70_000, ""])
def test_what_a_power_cut_left_of_a_line_costs_no_other_record(tmp_path: Path, left: str) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for step in (1, 2):
        with Metrics(_config(tmp_path), is_writer=True) as metrics:
            metrics.record(step, {"loss": 2.5})
        if step == 1:
            path.write_text(path.read_text() + left)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_file_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with Metrics(_config(tmp_path), is_writer=True) as metrics:
        metrics.record(1, {"loss": 2.5})
        path.unlink()
        metrics.record(2, {"loss": 1.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2]


def test_other_ranks_write_nothing_but_what_they_alone_have(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with Metrics(
        _config(tmp_path, tensorboard=True, wandb_project="p", wandb_mode="offline"),
        is_writer=False,
    ) as metrics:
        metrics.record(1, {"loss": 1.0})
        metrics.log("hello")
        metrics.log_own("of this rank alone")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == "of this rank alone\n"


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(_config(tmp_path, tensorboard=True), is_writer=True) as metrics:
        for step in (1, 2, 3):
            metrics.record(step, {"loss": 1.0 / step, "lr": 0.5})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert len(events.Scalars("lr")) == 3


def test_weights_and_biases_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "wandb", reason="Weights & Biases is an optional extra: pip install megavlm[wandb]"
    )
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = _config(tmp_path, wandb_project="megavlm-tests", wandb_mode="offline", run_name="here")
    with Metrics(config, is_writer=True) as metrics:
        metrics.record(1, {"loss": 1.0})
    [record] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size > 0


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(0.5, "4 s"), (30.0, "4 min"), (1000.0, "2 h 13 min"), (20000.0, "1 d 20 h")],
)
def test_the_console_says_how_long_the_rest_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture, seconds: float, left: str
) -> None:
    with Metrics(_config(tmp_path), is_writer=True) as metrics:
        metrics.record(2, {STEP_SECONDS: seconds})
        metrics.record(10, {STEP_SECONDS: seconds})
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"step 2 of 10  {STEP_SECONDS} {seconds:g}  left {left}"
    assert last == f"step 10 of 10  {STEP_SECONDS} {seconds:g}"


def test_seconds_a_step_do_not_count_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start of the clock and of the meter, pause, its end, report, restart.
    now = iter([0.0, 0.0, 10.0, 13.0, 23.0, 23.0])
    monkeypatch.setattr("megavlm.train.meters.time.perf_counter", lambda: next(now))
    clock = Clock()
    throughput = Throughput(training_cost(MODELS["tiny"], ("connector",)), clock)
    names = ("tokens", "squared_lengths", "tiles", "squared_tiles", "supervised")
    packs = np.zeros(2, [(name, "f8") for name in names])
    throughput.add_step(packs)
    throughput.add_step(packs)
    with clock.paused():
        pass
    assert throughput.report(SimpleNamespace(size=1), 2)[STEP_SECONDS] == 10.0


class Batches(Meter):
    """Counts microbatches, and those of each source, in a handful of lines."""

    def __init__(self):
        self.count = 0

    def add(self, losses, batch, weight_of_step):
        self.count += 1

    def report(self, groups, steps):
        return {"batches_per_step": self.count / steps, "batches": {"chats": float(self.count)}}


def test_reports_of_meters_are_merged_and_a_meter_overrides_what_it_needs() -> None:
    meter = Batches()
    for _ in range(4):
        meter.add(None, None, 1.0)
    meter.add_step(np.zeros(2))
    assert collect_reports([meter, meter], SimpleNamespace(size=1), 2) == (
        {"batches_per_step": 2.0},
        {"batches": {"chats": 4.0}},
    )


def test_what_holds_a_run_up_is_counted_anew_after_each_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(everywhere: torch.Tensor, own: torch.Tensor) -> None:
        everywhere.copy_(torch.cat([own, own + torch.tensor([1.0, 0.0])]))  # rank 1 waits longer

    clock = iter((0.0, 3.0, 10.0, 11.0, 20.0, 20.0))
    monkeypatch.setattr("megavlm.train.supply.time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr("megavlm.train.supply.dist.all_gather_into_tensor", gather)
    supply = Supply(SimpleNamespace(device=torch.device("cpu")), capacity=100)
    batches = supply.timed(iter("ab"))
    for tokens, wait, fill in (((50, 100), 1.5, 0.75), ((10, 20), 0.5, 0.15)):
        next(batches)
        supply.add_step(np.array([(count,) for count in tokens], [("tokens", "i8")]))
        assert supply.report(SimpleNamespace(size=2), 2) == {
            "fill": fill,
            "data_wait": wait + 1,
            "data_wait_rank": 1.0,
        }
    assert list(batches) == []
