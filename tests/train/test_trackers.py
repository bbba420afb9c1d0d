"""Trackers observe: they are refused early, never end a run, and continue their records."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from megavlm.checkpoint.directory import is_own
from megavlm.config.checks import observers
from megavlm.config.checks.observers import observer_problems
from megavlm.config.schema import Checkpoint, Config, Logging
from megavlm.train.metrics import Metrics
from megavlm.train.trackers import TensorBoard, Watched


def config_for(save: Path | str, **logging) -> Config:
    config = Config(stage="1", model="tiny", checkpoint=Checkpoint(save=str(save)))
    return dataclasses.replace(config, logging=Logging(**logging))


class Wandb(types.ModuleType):
    """Stands in for the package: remembers its calls, and may be unreachable or fail later."""

    def __init__(self, *, is_reachable: bool = True, can_log: bool = True):
        super().__init__("wandb")
        self.calls: list[dict] = []
        self.logged: list[dict] = []
        self.exit_codes: list[int] = []
        self._is_reachable = is_reachable
        self._can_log = can_log

    def Settings(self, **settings) -> dict:
        return settings

    def init(self, **arguments) -> Wandb:
        self.calls.append(arguments)
        if arguments["mode"] == "online" and not self._is_reachable:
            raise ConnectionError("no route to host")
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert step_metric == "step"

    def log(self, figures: dict) -> None:
        if not self._can_log:
            raise RuntimeError("no space left on device")
        self.logged.append(figures)

    def Image(self, path: str, caption: str) -> str:
        if path == "damaged.png":
            raise ValueError("no picture")
        return f"{path}: {caption}"

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.mark.parametrize(
    ("logging", "told"),
    [
        (Logging(tensorboard=True), "pip install 'megavlm[tensorboard]'"),
        (Logging(wandb_project="p"), "pip install 'megavlm[wandb]'"),
        (Logging(mlflow="e"), "pip install 'megavlm[mlflow]'"),
    ],
)
def test_a_missing_package_is_refused_with_the_extra(
    logging: Logging, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "find_spec", lambda name: None)
    [problem] = observer_problems(logging, Checkpoint(save="run"))
    assert told in problem and problem.startswith("--logging.")
    monkeypatch.setattr(observers, "find_spec", importlib.util.find_spec)


@pytest.mark.parametrize("place", ["nowhere", "environment", "netrc", "netrc of another host"])
def test_a_missing_key_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "find_spec", lambda name: object())
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "1234")
    elif place != "nowhere":
        host = "api.wandb.ai" if place == "netrc" else "example.com"
        (tmp_path / "netrc").write_text(f"machine {host} login user password 1234\n")
        (tmp_path / "netrc").chmod(0o600)
    found = list(observer_problems(Logging(wandb_project="p"), Checkpoint(save="run")))
    assert bool(found) == (place in ("nowhere", "netrc of another host"))
    assert all("there is no key" in problem for problem in found)
    offline = Logging(wandb_project="p", wandb_mode="offline")
    assert not list(observer_problems(offline, Checkpoint(save="run")))


def test_a_server_that_cannot_be_reached_is_told_and_records_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake = Wandb(is_reachable=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Metrics(config_for(tmp_path / "run", wandb_project="p"), is_writer=True) as metrics:
        metrics.record(1, {"loss": 2.5})
    assert [call["mode"] for call in fake.calls] == ["online", "offline"]
    assert fake.logged == [{"loss": 2.5, "step": 1}]
    shown = capsys.readouterr().out
    assert shown.count("WARNING: Weights & Biases cannot be reached (ConnectionError") == 1


def test_without_a_folder_too_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(is_reachable=False))
    with Metrics(config_for("", wandb_project="p"), is_writer=True) as metrics:
        metrics.record(1, {"loss": 2.5})
    assert "Weights & Biases gets no more figures (ConnectionError" in capsys.readouterr().out


def test_a_tracker_that_fails_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(can_log=False))
    with Metrics(config_for(tmp_path / "run", wandb_project="p"), is_writer=True) as metrics:
        for step in (1, 2, 3):
            metrics.record(step, {"loss": 2.5})
    shown = capsys.readouterr().out
    assert shown.count("no space left on device") == 1 and "training continues" in shown
    assert "step 3 of 1000  loss 2.5" in shown


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for save in ("run", "run", "other"):
        with (
            pytest.raises(SystemExit) if save == "other" else contextlib.nullcontext(),
            Metrics(config_for(tmp_path / save, wandb_project="p"), is_writer=True),
        ):
            if save == "other":
                raise SystemExit(2)
    assert fake.exit_codes == [0, 0, 1]
    first, again, other = fake.calls
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"
    assert all(is_own(entry) for entry in (tmp_path / "run").iterdir())


def test_the_first_answers_with_pictures_are_shown_and_one_that_is_damaged_ends_no_curve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    row = dict(image=["a.png"], question="Who?", prediction="he", answers=["she", "he", "she"])
    with Metrics(config_for("", wandb_project="p"), is_writer=True) as metrics:
        metrics.show(3, {"exam": [row | dict(image=[]), *[row] * 9]})
        metrics.show(4, {"exam": [row | dict(image=["damaged.png"])], "text": []})
        metrics.record(5, {"loss": 2.5})
    assert fake.logged == [
        {"answers/exam": ["a.png: Who?\nanswer: he\nright: she or he"] * 8, "step": 3},
        {"loss": 2.5, "step": 5},
    ]
    assert "the pictures of exam are not shown (ValueError: no picture)" in capsys.readouterr().out


def test_answers_with_pictures_reach_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="optional: pip install megavlm[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    row = dict(id="1", question="Who?", prediction="he", answers=["she", "she"], score=0.0)
    rows = [row | dict(image=[str(tmp_path / "red.png")]) for _ in range(9)]
    config = config_for(tmp_path / "run", wandb_project="p", wandb_mode="offline")
    with Metrics(config, is_writer=True) as metrics:
        metrics.show(3, {"exam": [*rows, rows[0] | dict(image=[])]})
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    pictures = list(folder.glob("files/media/images/answers/*.png"))
    assert len(pictures) == 1  # one file, however often it is shown
    [record] = folder.glob("*.wandb")
    caption = b"Who?\\nanswer: he\\nright: she"
    late = time.monotonic() + 120  # a process of its own writes, and a busy machine delays it
    while caption not in record.read_bytes() and time.monotonic() < late:
        time.sleep(0.2)
    assert caption in record.read_bytes()


class Mlflow:
    """Stands in for the client of the package: remembers what it is told, and has the limits of a
    server.
    """

    def __init__(self, tracking_uri: str = ""):
        self.params: list = []
        self.metrics: list = []
        self.states: list[str] = []
        self.tags: dict = {}

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "7"

    def search_runs(self, experiments: list[str], wanted: str) -> list:
        own = self.tags and wanted == f"tags.megavlm_run_id = '{self.tags['megavlm_run_id']}'"
        return [self._run()] if own else []

    def create_run(self, experiment: str, tags: dict, run_name: str | None) -> object:
        self.tags = tags
        return self._run()

    def log_batch(self, run: str, params: Sequence = (), metrics: Sequence = ()) -> None:
        assert run == "run" and len(params) <= 100
        assert all(len(value) <= 500 for _, value in params)
        assert all(re.fullmatch(r"[\w\-. ]+", name) for name, *_ in metrics)
        self.params.extend(params)
        self.metrics.extend((name, value, step) for name, value, _, step in metrics)

    def update_run(self, run: str, status: str) -> None:
        self.states.append(status)

    set_terminated = update_run

    def _run(self) -> object:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run"))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    """Put the stand-in in the place of the package."""
    client = Mlflow()
    entities = types.SimpleNamespace(Metric=lambda *facts: facts, Param=lambda *facts: facts)
    tracking = types.SimpleNamespace(MlflowClient=lambda tracking_uri: client)
    for name, part in (("mlflow.entities", entities), ("mlflow.tracking", tracking)):
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    return client


def test_mlflow_gets_what_its_server_takes_and_is_told_how_a_run_ends(
    tmp_path: Path, mlflow: Mlflow
) -> None:
    folders = ",".join(f"packs/{number}" for number in range(100))
    config = config_for(tmp_path / "run", mlflow="tests")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=folders))
    with Metrics(config, is_writer=True) as metrics:
        metrics.record(1, {"loss": 1.0}, {"loss": {"chats*": 2.0}})
    assert mlflow.states == ["FINISHED"]
    settings = dict(mlflow.params)
    assert len(settings) == len(mlflow.params) > 100
    assert settings["data.train"] == folders[:500]
    assert mlflow.metrics == [("loss", 1.0, 1), ("loss.chats_", 2.0, 1)]
    with pytest.raises(SystemExit), Metrics(config, is_writer=True):
        raise SystemExit(2)
    assert mlflow.states == ["FINISHED", "RUNNING", "FAILED"]
    assert len(settings) == len(mlflow.params)


def test_a_resumed_run_is_the_same_run_of_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="optional: megavlm[mlflow]")
    config = config_for(tmp_path / "run", mlflow="tests", run_name="here")
    for step in (1, 2):
        with Metrics(config, is_writer=True, step=step - 1) as metrics:
            metrics.record(step, {"loss": 1.0 / step}, {"loss": {"chats*": 2.0}})
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tests").experiment_id
    [run] = client.search_runs([experiment])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert run.data.metrics["loss.chats_"] == 2.0 and run.info.status == "FINISHED"
    assert run.data.params["model"] == "tiny" and run.info.run_name == "here"
    assert all(is_own(entry) for entry in (tmp_path / "run").iterdir())


def test_tensorboard_hides_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_for(tmp_path / "run", tensorboard=True)
    with Metrics(config, is_writer=True, step=0) as metrics:  # killed before its first checkpoint
        metrics.record(0, {"loss": 3.0})
        metrics.record(2, {"loss": 3.0})
    for start, value in ((0, 1.0), (3, 2.0)):
        with Metrics(config, is_writer=True, step=start) as metrics:
            for step in range(start + 1, 6):
                metrics.record(step, {"loss": value})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
    ]


def test_tensorboard_that_cannot_write_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()  # where its folder should be
    told: list[str] = []
    config = config_for(tmp_path / "run", tensorboard=True)
    board = Watched("TensorBoard", lambda: TensorBoard(config, 0), told.append)
    board.record(1, {"loss": 1.0})
    board.close(has_failed=False)
    assert len(told) == 1 and "TensorBoard gets no more figures" in told[0]
