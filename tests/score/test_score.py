"""Scores of records are the similarities that transformers gives, none is lost in silence, and the
packer filters by them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.settings import Job as Packing
from megavlm.data.records.filters import parse_filter
from megavlm.data.records.meta_file import single_source
from megavlm.data.records.scores import Scores
from megavlm.score import job as scoring
from megavlm.score.command_line import parse
from megavlm.score.job import score_dataset
from megavlm.score.settings import Job
from tests.convert.models import make_hf
from tests.score.models import (
    caption,
    embeddings_of_transformers,
    make_captions,
    make_image,
    make_towers,
    write_lines,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a ``clip``, a ``siglip``, ``images`` and ``good.jsonl`` of 20 captions."""
    folder = tmp_path_factory.mktemp("scoring")
    for kind in ("clip", "siglip"):
        make_towers(folder / kind, kind)
    write_lines(folder / "good.jsonl", make_captions(folder / "images", 20))
    return folder


def job_of(data: Path, out: Path, name: str = "good", kind: str = "clip", **settings: Any) -> Job:
    sources = single_source(data / f"{name}.jsonl", data / "images")
    return Job(sources=sources, model=str(data / kind), out=str(out), **settings)


def expected_scores(data: Path, kind: str, pairs: list[tuple[str, str]]) -> np.ndarray:
    images = [data / "images" / name for name, _ in pairs]
    of_images, of_texts = embeddings_of_transformers(
        data / kind, kind, images, [text for _, text in pairs]
    )
    return (of_images * of_texts).sum(axis=1)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_those_of_transformers(data: Path, tmp_path: Path, kind: str) -> None:
    report = score_dataset(job_of(data, tmp_path / "out", kind=kind, batch=7))
    found = np.load(tmp_path / "out" / "00000.scores.npy")
    pairs = [(f"{number}.png", caption(number)) for number in range(20)]
    expected = expected_scores(data, kind, pairs)
    assert found == pytest.approx(expected, abs=1e-5) and expected.std() > 0.05
    assert (report.records, report.scored, report.unscored) == (20, 20, {})
    assert report.mean == pytest.approx(expected.mean(), abs=1e-5)
    assert report.std == pytest.approx(expected.std(), abs=1e-5)
    assert report.percentiles["50"] == pytest.approx(np.sort(expected)[9], abs=2e-4)
    for edge, count in report.histogram:
        assert count == np.sum((expected >= edge) & (expected < edge + 0.02)), edge
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["records"] == 20 and "20: 20 scored, 0 without" in report.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def mixed(data: Path) -> Path:
    """Write ``mixed.jsonl``: forms of records, of which some have no score, and a blank line."""
    make_image(data / "images" / "cut.png", 3)
    whole = (data / "images" / "cut.png").read_bytes()
    (data / "images" / "cut.png").write_bytes(whole[:-400])
    two = [
        {"from": "human", "value": "<image>\n<image>\nwhat"},
        {"from": "gpt", "value": "a red dog"},
        {"from": "human", "value": "and"},
        {"from": "gpt", "value": "a cat"},
    ]
    write_lines(
        data / "mixed.jsonl",
        [
            {"image": "0.png", "caption": "a red dog"},
            {"image": ["1.png", "2.png"], "conversations": two},
            {"text": "no image"},
            {"image": "nowhere.png", "caption": "a"},
            {"image": "cut.png", "caption": "a"},
            {"image": "0.png", "text": "<image>a green cat"},
        ],
    )
    lines = (data / "mixed.jsonl").read_text().splitlines()
    (data / "mixed.jsonl").write_text("\n".join([*lines[:3], "", '{"image": ', *lines[3:]]))
    return data


def test_each_record_has_a_score_or_a_reason(mixed: Path, tmp_path: Path) -> None:
    report = score_dataset(job_of(mixed, tmp_path / "out", "mixed", kind="siglip"))
    found = np.load(tmp_path / "out" / "00000.scores.npy")
    said = "a red dog a cat"
    pairs = [("0.png", "a red dog"), ("1.png", said), ("2.png", said), ("0.png", "a green cat")]
    one, left, right, last = expected_scores(mixed, "siglip", pairs)
    nan = np.nan
    wanted = [one, (left + right) / 2, nan, nan, nan, nan, nan, last]
    assert found == pytest.approx(np.array(wanted), abs=1e-5, nan_ok=True)
    lines = (tmp_path / "out" / "unscored.jsonl").read_text().splitlines()
    reasons = {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons == {
        3: "no_pair",
        5: "malformed_json",
        6: "missing_image",
        7: "unreadable_image",
    }
    assert report.unscored == dict(Counter(reasons.values())) and report.records == 7
    assert np.load(tmp_path / "out" / "00000.duplicates.npy").tolist() == [False] * 7 + [True]
    assert report.near_duplicates == 1


def packing_of(data: Path, out: Path, *words: str) -> Packing:
    sources = single_source(
        data / "mixed.jsonl", data / "images", keep=parse_filter(words, "--filter")
    )
    return Packing(
        sources=sources,
        tokenizer=str(data / "siglip"),
        out=str(out),
        capacity=512,
        features_per_tile=0,
        template="siglip",
        tiling=Tiling(tile_size=16, max_tiles=1),
        max_rejects=0.0,
    )


def test_the_packer_filters_by_scores(mixed: Path, tmp_path: Path) -> None:
    score_dataset(job_of(mixed, tmp_path / "scores", "mixed", kind="siglip"))
    found = np.load(tmp_path / "scores" / "00000.scores.npy")
    text = (mixed / "mixed.jsonl").read_text()
    out = tmp_path / "packs"
    scores = f"scores={tmp_path / 'scores'}"
    least = float(np.nanmin(found)) + 1e-4
    with pytest.raises(ValueError, match="2 of 7 records"):
        pack_dataset(packing_of(mixed, out, scores, f"min_score={least}"))
    job = packing_of(mixed, tmp_path / "more", scores, f"min_score={least}")
    report = pack_dataset(Packing(**vars(job) | {"max_rejects": 0.5}))
    # What the template cannot take is rejected as before.
    others = {"conversation": 1, "malformed_json": 1}
    assert report.rejects == {"filtered_score": 1, "filtered_unscored": 3, **others}
    job = packing_of(mixed, tmp_path / "single", scores, "drop_duplicates=true")
    report = pack_dataset(Packing(**vars(job) | {"max_rejects": 0.5}))
    assert report.rejects["filtered_duplicate"] == 1
    other = packing_of(mixed, tmp_path / "single", f"scores={tmp_path}", "min_score=0")
    with pytest.raises(FileNotFoundError, match=r"filter of mixed: scores .* has no scores.json"):
        other.check()
    (mixed / "mixed.jsonl").write_text(text + " ")
    with pytest.raises(ValueError, match=r"mixed.jsonl has changed since it was scored"):
        packing_of(mixed, tmp_path / "changed", scores, "min_score=0").check()
    (mixed / "other.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"has no scores of .*other.jsonl"):
        Scores(str(tmp_path / "scores")).check([str(mixed / "other.jsonl")])


class Stop(BaseException):
    """What ends a job in the middle."""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith("report")
    }


def check_damage(partial: Path, job: Callable[[], Job]) -> None:
    """See that a job names the damaged files of a stopped one."""
    kept = {path: path.read_bytes() for path in partial.iterdir() if path.name != "lock"}
    state = partial / "state.json"
    if state not in kept:
        return
    facts = json.loads(kept[state])
    for path, content, words in [
        (state, json.dumps(facts | {"rows": "2"}), "state.json: rows: '2' is no int"),
        (state, json.dumps({"sources": []}), r"state.json: facts missing: \['bytes', 'complete'"),
        (partial / "rows.bin", "", "rows.bin: has 0 of"),
        (partial / "images.bin", "", "images.bin: has 0 of"),
        (partial / "unscored.jsonl", "", "unscored.jsonl: has 0 of"),
    ]:
        if content or kept[path]:
            path.write_text(content)
            with pytest.raises(ValueError, match=f"{words}.*; remove {partial} to begin anew"):
                score_dataset(job())
            path.write_bytes(kept[path])


def test_a_stopped_job_resumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RECORDS_PER_TASK", 3)
    monkeypatch.setattr(scoring, "SAVE_INTERVAL_SECONDS", 0.0)
    score_dataset(job_of(data, tmp_path / "whole", batch=2))
    rng = random.Random(1)
    ordered_map = scoring.ordered_map

    def stopping(*arguments: Any) -> Iterator[Any]:
        for result in ordered_map(*arguments):
            if rng.random() < 0.3:
                raise Stop
            yield result

    monkeypatch.setattr(scoring, "ordered_map", stopping)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            score_dataset(job_of(data, tmp_path / "out", batch=2))
        except Stop:
            stops += 1
            assert (tmp_path / "out.partial").exists()
            with pytest.raises(FileExistsError, match=r"left by another job \(batch: 2 there"):
                score_dataset(job_of(data, tmp_path / "out", batch=4))
            check_damage(tmp_path / "out.partial", lambda: job_of(data, tmp_path / "out", batch=2))
    assert stops > 1 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_processes_give_the_same(data: Path, tmp_path: Path) -> None:
    score_dataset(job_of(data, tmp_path / "one"))
    score_dataset(job_of(data, tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_weights_make_other_scores(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a job of a cluster that has several ranks elsewhere.
    around = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    found = []
    for number in range(2):
        weights = data / "clip" / "model.safetensors"
        os.utime(weights, (number, number))
        score_dataset(job_of(data, tmp_path / str(number)))
        found.append(contents(tmp_path / str(number)))
    told = [files.pop("scores.json") for files in found]
    assert found[0] == found[1] and told[0] != told[1], "packs made by the old ones are not reused"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "--workers -1"),
        ({"batch": 0}, "--batch 0"),
        ({"duplicates": 1.5}, "--duplicates 1.5"),
        ({"kind": "nothing"}, "--model .*nothing: there is no such folder"),
        ({"kind": "images"}, "holds neither a checkpoint nor a config.json"),
        ({"kind": "chat"}, "objective next_token gives no embeddings"),
        ({"kind": "clip", "tokenizer": "nowhere"}, "nowhere has no tokenizer; name"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("kind") == "chat":
        make_hf(data / "chat")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score_dataset(job_of(data, tmp_path / "out", **settings))
    assert not list(tmp_path.iterdir())


def test_a_dataset_without_any_score_is_an_error(data: Path, tmp_path: Path) -> None:
    write_lines(data / "lost.jsonl", [{"image": "nowhere.png", "caption": "a"}])
    with pytest.raises(ValueError, match=r"none of 1 records has a score(.|\n)*missing_image"):
        score_dataset(job_of(data, tmp_path / "out", "lost"))
    (data / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records in"):
        score_dataset(job_of(data, tmp_path / "none", "empty"))


def test_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(data / "clip"), "--jsonl", str(data / "good.jsonl"), "--out", "there"]
    job = Job(**parse([*words, "--duplicates", "0", "--workers", "3"]))
    assert (job.out, job.duplicates, job.processes) == ("there", 0.0, 3)
    assert job.sources[0].name == "good" and Job(**parse(words)).processes > 0
    with pytest.raises(SystemExit):
        parse(words[2:])
    assert "--model" in capsys.readouterr().err


def test_the_tool_prints_no_warning_of_packages_that_are_not_used(
    data: Path, tmp_path: Path
) -> None:
    tool = Path(__file__).parents[2] / "tools" / "score_dataset.py"
    words = ["--model", data / "clip", "--jsonl", data / "good.jsonl", "--root", data / "images"]
    command = [sys.executable, tool, *words, "--workers", "0", "--out", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in run.stderr, run.stderr
