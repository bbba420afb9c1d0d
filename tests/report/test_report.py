"""The page about runs shows what the runs have written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megavlm.config.cli import parse, to_yaml
from megavlm.report.chart import chart
from megavlm.report.run_log import read_run
from tests.data.samples import make_dataset
from tools.report import main

START = dict(trainable_parameters=10)


def write_run(folder: Path, *records: dict, settings: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(dict(time=1.7e9 + number) | row) for number, row in enumerate(records)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if settings:
        step = folder / "step_00000004"
        step.mkdir()
        (step / "config.yaml").write_text(settings)
        (step / "state.json").write_text("{}")
    return folder


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Make a run that was killed after step 3 and resumed after step 2."""
    return write_run(
        tmp_path / "resumed",
        dict(step=0) | START,
        dict(step=1, loss=4.0, lr=0.1),
        dict(step=2, loss=3.0, lr=0.1),
        dict(step=2, valid_loss=3.5),
        dict(step=3, loss=99.0, lr=0.1, text="words"),
        dict(step=2) | START,
        dict(step=2, valid_loss=3.5),
        dict(step=3, loss=2.0, lr=0.05),
        dict(step=4, loss=1.0, lr=None),
        settings="stage: '2'\noptimizer:\n  lr: 0.1\n",
    )


def figures(page: str) -> dict:
    (content,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    return json.loads(content)


def test_steps_that_were_done_again_count_once(resumed: Path):
    run = read_run(resumed)
    assert run.figures["loss"] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert run.figures["lr"] == [(1, 0.1), (2, 0.1), (3, 0.05)]
    assert [(start.step, start.reached) for start in run.starts] == [(0, 0), (2, 3)]
    assert run.settings == {"stage": "2", "optimizer.lr": 0.1}


def test_a_run_that_ends_at_once_when_it_is_resumed_has_not_lost_more_steps(tmp_path: Path):
    run = read_run(
        write_run(
            tmp_path / "run",
            dict(step=0) | START,
            dict(step=3, loss=1.0),
            dict(step=2) | START,
            dict(step=2) | START,
        )
    )
    assert [(start.step, start.reached) for start in run.starts] == [(0, 0), (2, 3), (2, 3)]


def test_the_page_holds_curves_settings_events_and_answers(resumed: Path, tmp_path: Path):
    other = write_run(
        tmp_path / "other",
        dict(step=0) | START,
        dict(step=1, loss=5.0),
        dict(step=4, loss=2.5),
        settings="stage: '2'\noptimizer:\n  lr: 0.2\n",
    )
    answers = other / "answers" / "step-00000004"
    answers.mkdir(parents=True)
    row = dict(id="1", question="Who <b>\u2028?", image=["gone.png"], prediction="x", answers=["y"])
    content = json.dumps(row | dict(score=0.0), ensure_ascii=False) + "\n"
    (answers / "exam.jsonl").write_text(content)
    out = tmp_path / "report.html"
    assert main([f"a={resumed}", str(other), "--out", str(out)]) == 0
    page = out.read_text()
    assert figures(page) == {
        "a": {
            "loss": [[1, 4.0], [2, 3.0], [3, 2.0], [4, 1.0]],
            "lr": [[1, 0.1], [2, 0.1], [3, 0.05]],
            "valid_loss": [[2, 3.5]],
        },
        "other": {"loss": [[1, 5.0], [4, 2.5]]},
    }
    assert page.count("<polyline") == 3  # two losses, one learning rate
    assert "<code>--optimizer.lr</code></td><td>0.1</td><td>0.2</td>" in page
    assert "--stage" not in page  # both have the same
    assert "resumed after step 2; 1 steps that had been done were done again" in page
    assert "Who &lt;b&gt;\u2028?" in page
    assert "gone.png" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_what_people_look_for_comes_first_and_events_in_their_order(tmp_path: Path):
    run = write_run(
        tmp_path / "run",
        dict(step=0) | START,
        dict(step=1, other=1.0, lr=0.1, loss=2.0, skipped_steps=1),
        dict(step=1) | START,
        dict(step=2, other=1.0, lr=0.1, loss=1.0, skipped_steps=1),
    )
    for step, prediction in ((1, "outdated"), (2, "newest")):
        row = dict(id="1", question="Who?", image=[], answers=["y"], score=0.0)
        answers = run / "answers" / f"step-0000000{step}"
        answers.mkdir(parents=True)
        (answers / "exam.jsonl").write_text(json.dumps(row | dict(prediction=prediction)) + "\n")
    out = tmp_path / "report.html"
    names = [f"run {number}</script>" for number in range(9)]  # more than there are colours
    assert main([*(f"{name}={run}" for name in names), "--out", str(out)]) == 0
    page = out.read_text()
    assert list(figures(page)) == names
    drawn = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert drawn == ["loss", "lr", "other", "skipped_steps"]
    colours = re.findall("--colour: (#[0-9a-f]*)", page)
    assert colours[0] == colours[8] and len(set(colours[:8])) == 8
    assert [row[2] for row in cells(page, "Events")[:3]] == [
        *("started", "skipped 1 steps up to step 1", "resumed after step 1")
    ]
    assert "newest" in page and "outdated" not in page


def test_a_long_curve_has_a_dot_at_its_end_alone():
    dots = [
        chart("lr", [[(step, 1.0) for step in range(count)]]).count("<circle") for count in (60, 61)
    ]
    assert dots == [60, 1]


def cells(page: str, title: str) -> list[list[str]]:
    """Read the rows of a table below a title, without its head."""
    (table,) = re.findall(rf"<h2>{title}</h2>\n<table>(.*?)</table>", page, re.DOTALL)
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in table.split("\n")[1:]
        if row
    ]


def test_layout_data_skips_and_saves_are_told(tmp_path: Path):
    make_dataset(tmp_path / "a", packs=4, samples_per_pack=2, sources=("left", "right"))
    make_dataset(tmp_path / "b", packs=2, samples_per_pack=2)
    config = parse(
        [
            *("--stage", "2", "--model", "tiny", "--training.trainable", "connector,language"),
            *("--data.train", f"{tmp_path / 'a'},{tmp_path / 'b'}"),
            *("--parallel.pipeline_model_parallel_size", "2", "--parallel.layout", "v|v*3,t*4"),
        ]
    )
    run = write_run(
        tmp_path / "run",
        dict(step=0) | START,
        *(dict(step=step, skipped_steps=skipped) for step, skipped in ((1, 0), (3, 2), (4, 2))),
        settings=to_yaml(config),
    )
    shutil.copytree(run / "step_00000004", run / "step_00000002")
    (run / "latest").write_text("step_00000009\n")  # which is gone
    for file, late in (("2/config.yaml", 1.8e9), ("2/state.json", 1.8e9), ("4/state.json", 1.9e9)):
        os.utime(run / f"step_0000000{file}", (late, late))
    out = tmp_path / "report.html"
    assert main([str(run), "--out", str(out)]) == 0
    page = out.read_text()
    (first, second) = cells(page, "Layout")
    assert first[:3] == ["run", "0", "vision layers 0 to 0"]
    assert second[:3] == [
        "run",
        "1",
        "vision layers 1 to 3, connector, language layers 0 to 3, head",
    ]
    shares = [float(row[3].rstrip("%")) for row in (first, second)]
    assert 0 < shares[0] < shares[1] and abs(sum(shares) - 100) < 0.2
    assert [row[1:] for row in cells(page, "Data")] == [
        ["a/left", "8", "40.0%"],
        ["a/right", "8", "40.0%"],
        ["b/random", "4", "20.0%"],
    ]
    assert [row[2] for row in cells(page, "Events")] == [
        *("started", "skipped 2 steps up to step 3"),
        *(f"saved the checkpoint of step {step}" for step in (2, 4)),
    ]
    (tmp_path / "b" / "manifest.json").unlink()
    assert main([str(run), "--out", str(out)]) == 0
    ((_, _, told, _),) = cells(out.read_text(), "Data")
    assert told.startswith("not known: ") and str(tmp_path / "b") in told


def test_a_curve_goes_through_its_points():
    drawn = chart("lr", [[(0, 1.0), (10, 3.0), (20, 2.0)], []])
    (corners,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    points = [tuple(map(float, corner.split(","))) for corner in corners.split()]
    assert points == [(62.0, 212.0), (255.0, 10.0), (448.0, 111.0)]


@pytest.mark.parametrize("name", ["loss", "lr"])
def test_a_steep_loss_has_equal_lengths_for_equal_ratios(name: str):
    drawn = chart(name, [[(0, 100.0), (1, 10.0), (2, 1.0)]])
    (corners,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    heights = [float(corner.split(",")[1]) for corner in corners.split()]
    is_even = abs(heights[1] - (heights[0] + heights[2]) / 2) < 0.2
    assert is_even == (name == "loss")


def test_curves_that_are_flat():
    assert "<polyline" in chart("loss", [[(3, 0.0), (4, 0.0)]])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"metrics.jsonl: no figures of a run are there \(No such file"),
        ('{"step": 1}\n{"st', "metrics.jsonl:2: not a record of a run"),
        ("[]\n", "metrics.jsonl:1: not a record of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, told: str, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "x.html").exists()


def test_two_runs_of_one_name(resumed: Path, capsys):
    assert main([str(resumed), str(resumed)]) == 2
    assert "two runs are called resumed; name them: NAME=DIR" in capsys.readouterr().err
