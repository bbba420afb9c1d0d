"""Tasks are answered as transformers answers them, at every layout; training does not notice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megavlm.checkpoint import train_state
from megavlm.config.schema import Checkpoint, Config, Eval, Logging
from tests.convert.models import TOKENIZER
from tests.data.samples import make_dataset, make_image
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for
from tests.ranks.test_against_transformers import random_model
from tests.ranks.test_resume import losses, run_job
from tools import chat, evaluate

CONTEXT = 5
NEW_TOKENS = 6
ARCHITECTURE = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, vocab_size=457)
)
LAYOUTS = {
    "TP2 SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2 virtual 2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "CP2": (2, dict(context_parallel_size=2)),
    "PP2 DP2": (4, dict(pipeline_model_parallel_size=2)),
}
RARE = {
    "PP2": (2, dict(pipeline_model_parallel_size=2)),
    "DP2": (2, {}),
    "TP2 PP2 DP2": (8, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
LAYOUTS |= RARE if asks_for_all() else {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs with a tokenizer, a Hugging Face model, and two tasks."""
    root = tmp_path_factory.mktemp("answers")
    make_dataset(
        root / "packs",
        packs=8,
        vocab_size=457,
        context_token_id=CONTEXT,
        tile_size=16,
        features_per_tile=4,
        capacity=256,
        alignment=4,
    )
    shutil.copytree(TOKENIZER, root / "packs" / "tokenizer")
    random_model(ARCHITECTURE, CONTEXT, root / "hf")
    rng = np.random.default_rng(4)
    for number in range(3):
        image = make_image(rng, 16, 1 + number, 1)
        (root / f"{number}.png").write_bytes(image.encoded)
    (root / "frames").mkdir()
    for number in range(5):
        (root / "frames" / f"{number}.png").write_bytes(make_image(rng, 16, 1, 1).encoded)
    asked = [
        dict(question="What is it?", image="0.png", answer="red", category="one"),
        dict(question="Who?", answers=["he", "she"], category="none"),
        dict(question="<image> or <image>?", image=["1.png", "2.png"], answer="blue"),
        dict(
            question="A rather long question, in many words. " * 3, answer="no", system="Be kind."
        ),
        dict(question="How many?", image="2.png", answer="3", category="one"),
        dict(question="What happens?", video="frames", frames=3, answer="red"),
    ]
    chosen = [
        dict(question=f"{row['question']} A. red B. green C. blue", answer="B")
        | {key: row[key] for key in ("image", "video", "frames") if key in row}
        | dict(choices=["red", "green", "blue"], metric="multiple_choice")
        for row in asked
    ]
    for name, rows in (("free", asked), ("choice", chosen)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def configure(root: Path, **settings) -> Config:
    config = config_for(root / "packs", **settings)
    tasks = (str(root / "free.jsonl"), str(root / "choice.jsonl"))
    return dataclasses.replace(
        config,
        architecture=ARCHITECTURE,
        # One pack at once.
        eval=Eval(tasks=tasks, max_new_tokens=NEW_TOKENS, cache_gib=1e-6),
    )


def answers(config: Config, folder: Path) -> tuple[list[list[int]], list[int]]:
    """Answer both tasks with the weights of a Hugging Face folder."""
    from megavlm.convert.hf import convert
    from megavlm.model import weights
    from megavlm.train.generate import choose, generate
    from megavlm.train.tasks import open_tasks
    from tests.ranks.runs import build

    job = build(config)
    weights.fill(job.chunks, convert.full_tensors(folder, config.architecture))
    for chunk in job.ddp_chunks:
        chunk.eval()
    free, choice = open_tasks(config)
    found = generate(job, free, config.eval.max_new_tokens)
    found = [[token for token in tokens if token not in free.ends] for tokens in found]
    chosen = choose(job, choice)
    return found, chosen if job.groups.has_last_chunk else []


@pytest.fixture(scope="module")
def alone(folders: Path, ranks: Pool) -> tuple[list[list[int]], list[int]]:
    """Answer in one process."""
    (found,) = ranks.run(answers, 1, configure(folders), folders / "hf")
    return found


def test_answers_equal_those_of_transformers(folders: Path, alone):
    from megavlm.convert.hf.reference import load_reference
    from megavlm.evaluate import by_transformers
    from megavlm.train.tasks import open_tasks

    free, choice = open_tasks(configure(folders))
    model = load_reference(folders / "hf")
    assert len(free.order) > 1
    generated, chosen = alone
    theirs = by_transformers.generate(model, free, NEW_TOKENS)
    assert generated == [[token for token in tokens if token not in free.ends] for tokens in theirs]
    assert len({tuple(answer) for answer in generated}) > 1
    assert chosen == by_transformers.choose(model, choice)
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_answers(folders: Path, ranks: Pool, alone, layout: str):
    count, settings = LAYOUTS[layout]
    found = ranks.run(answers, count, configure(folders, **settings), folders / "hf")
    assert {tuple(map(tuple, tokens)) for tokens, _ in found} == {tuple(map(tuple, alone[0]))}
    assert {tuple(chosen) for _, chosen in found} - {()} == {tuple(alone[1])}


def job(root: Path, save: Path, **settings) -> Config:
    """Configure a run of three updates, which evaluates after each."""
    settings = dict(steps=3, eval_interval=1, drop_path=0.2, global_batch_size=2) | settings
    config = dataclasses.replace(configure(root, **settings), logging=Logging(interval=1))
    return dataclasses.replace(config, checkpoint=Checkpoint(save=str(save), save_interval=3))


def figures(save: Path) -> list[dict[str, float]]:
    """Read the figures of a run's evaluations."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name.startswith(("free/", "choice/"))}
        for line in lines
        if "free/accuracy" in line
    ]


def test_training_does_not_notice_that_it_is_evaluated(folders: Path, ranks: Pool, tmp_path: Path):
    config = job(folders, tmp_path / "asked")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, valid=str(folders / "packs")),
        eval=dataclasses.replace(config.eval, without_images=True, control_interval=2),
    )
    ranks.run(run_job, 2, config)
    plain = dataclasses.replace(job(folders, tmp_path / "plain", eval_interval=0), eval=Eval())
    ranks.run(run_job, 2, plain)
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
    lines = (tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, lines) if "valid_loss" in row]
    assert len(measured) == 4
    for row in measured:
        difference = row["valid_loss_without_images"] - row["valid_loss"]
        assert 1e-5 < abs(difference) < 1, "the images changed nothing, or more than images can"
    blind = [row["step"] for row in map(json.loads, lines) if "loss_without_images" in row]
    assert blind == [2]
    found = figures(tmp_path / "asked")
    assert len(found) == 4  # before the first update, and after each
    assert set(found[0]) == {
        *("free/accuracy", "free/accuracy/none", "free/accuracy/one", "choice/accuracy")
    }
    state = train_state.read(tmp_path / "asked" / "step_00000003")
    assert state.figure("choice/accuracy") == found[3]["choice/accuracy"]
    written = sorted((tmp_path / "asked" / "answers").iterdir())
    assert [folder.name for folder in written] == [f"step-0000000{step}" for step in range(4)]
    rows = [json.loads(line) for line in (written[3] / "choice.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert {row["prediction"] for row in rows} <= {"A", "B", "C"}
    right = sum(row["prediction"] == "B" for row in rows) / len(rows)
    assert found[3]["choice/accuracy"] == right == sum(row["score"] for row in rows) / len(rows)

    only = dataclasses.replace(
        job(folders, tmp_path / "only", tensor_model_parallel_size=2),
        checkpoint=Checkpoint(save=str(tmp_path / "only"), load=str(tmp_path / "asked")),
        eval=dataclasses.replace(config.eval, only=True, without_images=False),
    )
    ranks.run(run_job, 2, only)
    assert figures(tmp_path / "only") == found[3:]
    assert not list((tmp_path / "only").glob("step_*"))


def test_one_question_is_answered(folders: Path, alone, capfd: pytest.CaptureFixture):
    from megavlm.train.tasks import open_tasks

    free, _ = open_tasks(configure(folders))
    words = [
        *(
            str(folders / "hf"),
            "What happens?",
            "--video",
            str(folders / "frames"),
            "--frames",
            "3",
        ),
        *("--packs", str(folders / "packs"), "--max_new_tokens", str(NEW_TOKENS)),
        *("--", "--training.precision", "float32"),
    ]
    assert chat.main(words) == 0
    assert capfd.readouterr().out == free.template.text(alone[0][5]).strip() + "\n"
    words[2:4] = ["--image", str(folders / "gone.png")]
    with pytest.raises(SystemExit) as ended:
        chat.main(words)
    done = capfd.readouterr()
    assert ended.value.code == 2 and "gone.png: no such file" in done.err
    assert done.out == ""


@pytest.mark.usefixtures("quick_start")
def test_models_are_compared(
    folders: Path, ranks: Pool, alone, tmp_path: Path, capfd: pytest.CaptureFixture
):
    config = job(folders, tmp_path / "run", eval_interval=0)
    ranks.run(run_job, 1, dataclasses.replace(config, eval=Eval()))
    out = tmp_path / "out"
    words = [
        *(str(folders / "hf"), str(tmp_path / "run")),
        *("--tasks", *config.eval.tasks, "--packs", str(folders / "packs"), "--out", str(out)),
        *("--max_new_tokens", str(NEW_TOKENS), "--", "--training.precision", "float32"),
    ]
    assert evaluate.main(words) == 0
    table = capfd.readouterr().out.splitlines()[-5:]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["hf", "run-step_00000003"]
    rows = (
        (out / "hf" / "run" / "answers" / "step-00000000" / "choice.jsonl").read_text().splitlines()
    )
    assert [json.loads(row)["prediction"] for row in rows] == ["ABC"[i] for i in alone[1]]
    assert summary["hf"]["choice/accuracy"] == alone[1].count(1) / 6
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8  # 4 images of each task
    assert "http" not in page
    assert table[0].split() == ["hf", "run-step_00000003"]
    by_transformers = [f"theirs={folders / 'hf'}", *words[2:-3], "--transformers"]
    assert evaluate.main(by_transformers) == 0
    theirs, ours = (out / name / "run" / "answers" / "step-00000000" for name in ("theirs", "hf"))
    for name in ("free.jsonl", "choice.jsonl"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()
    assert json.loads((out / "summary.json").read_text())["theirs"] == summary["hf"]
    assert evaluate.main([*by_transformers, *words[-3:]]) == 2
    assert "options of pretrain_vlm.py do not reach it" in capfd.readouterr().err
    with_examples = [
        *(str(folders / "hf"), "--tasks", str(folders / "free.jsonl")),
        *("--packs", str(folders / "packs"), "--out", str(tmp_path / "shots"), "--"),
        *("--eval.examples", str(folders / "free.jsonl"), "--eval.shots", "0,1"),
    ]
    assert evaluate.main(with_examples) == 0
    summary = json.loads((tmp_path / "shots" / "summary.json").read_text())
    assert {name.split("/")[0] for name in summary["hf"]} == {"free", "free_1_shots"}
    assert "<h2>free_1_shots" in (tmp_path / "shots" / "index.html").read_text()
    capfd.readouterr()
    # The same command does nothing again; another one says what is in the way.
    assert evaluate.main(words) == 0
    assert capfd.readouterr().out.splitlines() == table
    moved = tmp_path / "other" / "hf"
    shutil.copytree(folders / "hf", moved)
    words[0] = str(moved)
    assert evaluate.main(words) == 2
    refused = capfd.readouterr().err
    assert f"holds the answers of another model of that name, {folders / 'hf'}" in refused
    assert f"give this one a name: NAME={moved}" in refused
