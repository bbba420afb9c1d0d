"""Cross checks of what a model is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks.evaluation import evaluation_problems
from megavlm.config.schema import Architecture, Checkpoint, Config, Data, Eval, Training


def problems(
    evaluation: Eval | None = None,
    checkpoint: Checkpoint | None = None,
    valid: str = "",
    interval: int = 0,
    objective: str = "next_token",
) -> list[str]:
    config = Config(
        stage="2",
        model="tiny",
        architecture=Architecture(objective=objective),
        data=Data(valid=valid),
        training=Training(eval_interval=interval),
        checkpoint=checkpoint or Checkpoint(),
        eval=evaluation or Eval(),
    )
    return list(evaluation_problems(config))


@pytest.fixture
def exam(tmp_path: Path) -> str:
    path = tmp_path / "exam.jsonl"
    path.touch()
    return str(path)


def test_what_can_be(exam: str):
    assert problems() == []
    asked = Eval(tasks=(exam,))
    best = Checkpoint(save="run", load="there", keep_best=1, best_by="exam/accuracy")
    assert problems(asked, best, interval=10) == []
    assert problems(Eval(tasks=(exam,), only=True), best) == []
    assert problems(valid="packs", interval=10) == []
    assert problems(Eval(control_interval=20)) == []


def test_what_does_not_go_with_measuring_alone(exam: str, tmp_path: Path):
    only = Eval(tasks=(exam,), only=True)
    (tmp_path / "run" / "step_00000003").mkdir(parents=True)
    (problem,) = problems(only, Checkpoint(load="there", save=str(tmp_path / "run")))
    assert "run holds the checkpoints of a run; name the weights with --checkpoint.load" in problem
    (problem,) = problems(only, Checkpoint(load="there", save="new", export_hf="out"))
    assert problem.startswith("--eval.only true trains no model for --checkpoint.export_hf")
    assert problems(only, Checkpoint(load="there", save="new")) == []


def test_what_cannot_be(exam: str):
    best = Checkpoint(keep_best=1)
    for found, told in [
        (problems(Eval(tasks=("gone.jsonl",))), "--eval.tasks gone.jsonl: no such file"),
        (problems(Eval(max_new_tokens=0)), "--eval.max_new_tokens 0: must be at least 1"),
        (problems(Eval(cache_gib=0.0)), "--eval.cache_gib 0.0: must be more than 0"),
        (problems(Eval(tasks=(exam,)), objective="qformer"), "--eval.tasks asks for answers"),
        (
            problems(Eval(tasks=(exam,), shots=(0,)), objective="contrastive"),
            "--eval.shots puts examples in front of questions",
        ),
        (problems(interval=5), "--training.eval_interval 5 needs --data.valid"),
        (problems(Eval(tasks=(exam,)), best, interval=5), "--checkpoint.keep_best 1 goes by the"),
        (problems(None, Checkpoint(best_by="a/b")), "--checkpoint.best_by a/b has no effect"),
        (
            problems(Eval(tasks=(exam,)), Checkpoint(keep_best=1, best_by="a/b"), interval=5),
            "--checkpoint.best_by a/b: --eval.tasks has no task a; it must be valid_loss or",
        ),
        (problems(Eval(only=True), Checkpoint(load="x")), "--eval.only true needs --eval.tasks or"),
        (problems(Eval(only=True), valid="packs"), "--eval.only true needs the weights of"),
        (problems(Eval(control_interval=-1)), "--eval.control_interval -1: must be 0, or a number"),
        (problems(Eval(control_interval=15)), "--eval.control_interval 15: must be a multiple of"),
        (
            problems(Eval(control_interval=10), objective="contrastive"),
            "--eval.control_interval 10: the objective contrastive is nothing without images",
        ),
    ]:
        (problem,) = found
        assert problem.startswith(told)
