"""The run that measures a checkpoint takes its model, and none of its settings of training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.checks.unread import TOLERATED, unread
from megavlm.config.cli import parse
from megavlm.config.schema import Config, Data, Ema, Eval, Init
from megavlm.evaluate import run
from megavlm.evaluate.page import Answered
from megavlm.evaluate.run import AnswerOptions, _arguments, answer_with, answer_with_all
from tools import evaluate

EXPERTS = (
    *("--model", "internvl3_5-30b-a3b", "--parallel.expert_model_parallel_size", "8"),
    *("--experts.dispatcher", "allgather", "--experts.balance_loss", "0.1"),
)
WITH_ITS_OWN_PACKS = AnswerOptions(packs=None, max_new_tokens=1, ranks=1)


def test_settings_of_trained_experts_do_not_stand_in_the_way(tmp_path: Path) -> None:
    trained = parse(["--stage", "2", *EXPERTS])
    assert not [told for told in problems(trained, 8) if "experts" in told]
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    measuring = parse(_arguments(saved, tmp_path, Eval(), tmp_path, None))
    assert not [told for told in problems(measuring, 1) if "experts" in told]
    assert measuring.architecture == trained.architecture
    assert measuring.checkpoint.weights_only  # its optimizer is another's


@pytest.mark.parametrize("stage", ["1", ""])
@pytest.mark.parametrize("recipe", ["internvl", "llava_next", "clip"])
def test_a_checkpoint_needs_neither_a_stage_nor_the_folder_that_its_model_was_made_of(
    tmp_path: Path, recipe: str, stage: str
) -> None:
    trained = parse(["--recipe", recipe, "--stage", "1", "--model", "tiny"])
    trained = dataclasses.replace(trained, model="clip+language", init=Init(vision="gone"))
    kept = trained if stage else dataclasses.replace(trained, stage="", data=Data())  # an import
    saved = SimpleNamespace(config=kept, folder=tmp_path / "step_00000001")
    measuring = parse(_arguments(saved, tmp_path, Eval(), tmp_path, None))
    assert (measuring.model, measuring.architecture) == (trained.model, trained.architecture)
    assert measuring.data.loss_reduction == trained.data.loss_reduction


def test_an_imported_checkpoint_needs_no_stage_but_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = Config(recipe="instructblip", stage="", model="custom")
    saved = SimpleNamespace(config=imported, folder=tmp_path / "step_00000001")
    measuring = parse(_arguments(saved, tmp_path, Eval(), tmp_path, None))
    assert (measuring.recipe, measuring.stage) == ("instructblip", "1")
    monkeypatch.setattr(run.step_folder, "find", lambda model: saved)
    task = write_question(tmp_path / "exam.jsonl", "a cat")
    with pytest.raises(ValueError, match="not trained does not say how questions are packed"):
        answer_with(str(tmp_path), [task], tmp_path / "out", WITH_ITS_OWN_PACKS)
    # Before a model in front of it is asked.
    trained = parse(["--stage", "2", "--model", "tiny", "--data.train", str(tmp_path)])
    kinds = {"first": SimpleNamespace(config=trained, folder=tmp_path), "second": saved}
    monkeypatch.setattr(run.step_folder, "find", lambda model: kinds[model.name])
    monkeypatch.setattr(run, "answer_with", lambda *arguments: pytest.fail("one was asked"))
    with pytest.raises(ValueError, match="second: a checkpoint that was not trained does not say"):
        answer_with_all(["first", "second"], [task], tmp_path / "out", WITH_ITS_OWN_PACKS)


def test_packs_that_are_not_there_any_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = parse(["--stage", "2", "--model", "tiny", "--data.train", "packs/a,s3://packs/b"])
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    monkeypatch.setattr(run.step_folder, "find", lambda model: saved)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not there \(packs/a, seen from .*with --packs"):
        run._checkpoint(tmp_path, None)
    assert run._checkpoint(tmp_path, tmp_path / "packs") == saved
    (tmp_path / "packs" / "a").mkdir(parents=True)
    assert run._checkpoint(tmp_path, None) == saved


def test_averages_do_not_stand_in_the_way(tmp_path: Path) -> None:
    settings = ["--ema.decay", "0.999", "--ema.export", "true", "--ema.evaluate", "true"]
    folders = ["--checkpoint.export_hf", str(tmp_path / "hf"), "--data.valid", "valid"]
    trained = parse(["--stage", "2", "--model", "tiny", *settings, *folders])
    assert not [told for told in problems(trained, 1) if "ema" in told]
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    measuring = parse(_arguments(saved, tmp_path, Eval(), tmp_path, None))
    assert not [told for told in problems(measuring, 1) if "ema" in told]
    assert measuring.ema == Ema()


def test_it_does_not_warn_of_what_only_the_training_was_told(tmp_path: Path) -> None:
    told = ["--data.max_unreadable_packs", "3", "--health.lost_machine_seconds", "600"]
    told += ["--training.max_hours", "3", "--bad_steps.spike_factor", "9"]
    trained = parse(["--stage", "2", "--model", "tiny", *told])
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    measuring = parse(_arguments(saved, tmp_path, Eval(only=True), tmp_path, None))
    assert list(unread(measuring, TOLERATED)) == []


def write_question(path: Path, answer: str, **more: str) -> Path:
    path.write_text(json.dumps(dict(question="Which?", answer=answer, **more)) + "\n")
    return path


def answer_at_once(words: list[str], ranks: int, model: Path, *, is_quiet: bool) -> None:
    """Write what pretrain_vlm.py would write of a task."""
    target = Path(words[words.index("--checkpoint.save") + 1])
    answers = target / "answers" / "step-00000000"
    answers.mkdir(parents=True)
    (answers / "task.jsonl").write_text(json.dumps(dict(id="1", prediction="x")) + "\n")
    # The run's first record, and figures beside those of the task.
    records = [{"step": 0, "trainable_parameters": 1}, {"step": 0, "task": 9, "task/accuracy": 0.5}]
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    config = dict(model_type="internvl", architectures=["InternVLForConditionalGeneration"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ask(model: Path, *others: str, max_new_tokens: int = 4, **more: str) -> Answered:
    root = model.parent
    options = AnswerOptions(
        packs=root / "packs", max_new_tokens=max_new_tokens, ranks=1, others=others
    )
    task = write_question(root / "task.jsonl", "b", **more)
    return answer_with(str(model), [task], root / "out", options)


def test_a_model_that_has_changed_or_may_write_more_is_asked_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(
        run, "_run", lambda *given, **named: runs.append(given) or answer_at_once(*given, **named)
    )
    for _ in range(2):
        answered = ask(model)
        assert (answered.model, answered.figures) == ("hf", {"task/accuracy": 0.5})
    assert len(runs) == 1
    ask(model, max_new_tokens=5)
    assert len(runs) == 2
    (model / "model.safetensors").write_bytes(b"other weights")
    ask(model, max_new_tokens=5)
    assert len(runs) == 3


def test_a_folder_is_asked_at_the_image_size_of_its_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(vision=SimpleNamespace(image_size=28))
    monkeypatch.setattr(run, "architecture_from_hf", lambda folder: small)
    for name, resized in (("internvl_c", True), ("internvl", False)):
        monkeypatch.setattr(run, "recipe_of", lambda dialect, name=name: run.recipe(name))
        monkeypatch.setattr(run, "dialect_of", lambda folder: "any")
        words = run._of_folder(tmp_path)
        assert ("--architecture.vision.image_size 28" in " ".join(words)) == resized


def test_a_step_is_called_after_its_run(tmp_path: Path) -> None:
    assert run._noted_name("", tmp_path / "stage2" / "step_00000003", tmp_path / "out") == (
        "stage2-step_00000003"
    )
    assert run._noted_name("", tmp_path / "stage2", tmp_path / "out") == "stage2"


def test_a_run_that_fails_leaves_nothing_that_counts_as_done(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_run", answer_at_once)
    ask(model)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("the run that should answer ended with status 2")

    monkeypatch.setattr(run, "_run", fail)
    with pytest.raises(ValueError, match="status 2"):
        ask(model, "--unknown")
    with pytest.raises(ValueError, match="status 2"):
        ask(model)  # its answers are gone


@pytest.mark.parametrize("written_as", ["option", "option=", "settings"])
def test_other_examples_are_asked_for_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_as: str
) -> None:
    examples = write_question(tmp_path / "train.jsonl", "a")
    settings = tmp_path / "shots.yaml"
    settings.write_text(f"eval:\n  examples: {examples}\n")
    others = {
        "option": ["--eval.examples", str(examples)],
        "option=": [f"--eval.examples={examples}"],
        "settings": ["--config", str(settings)],
    }
    runs = []
    monkeypatch.setattr(
        run, "_run", lambda *given, **named: runs.append(given) or answer_at_once(*given, **named)
    )

    def asked() -> int:
        ask(model, *others[written_as], "--eval.shots", "1")
        return len(runs)

    assert [asked(), asked()] == [1, 1]
    write_question(examples, "c")
    assert [asked(), asked()] == [2, 2]
    settings.write_text(f"eval:\n  examples: {examples}\n  shots: [1]\n")
    assert asked() == (3 if written_as == "settings" else 2)


def test_other_images_and_packs_are_asked_about_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(
        run, "_run", lambda *given, **named: runs.append(given) or answer_at_once(*given, **named)
    )
    (tmp_path / "packs").mkdir()
    # Longer than the name of a file may be.
    layout = "v*2,c,t|" + "t|" * 150 + "h"

    def asked() -> int:
        ask(model, "--parallel.layout", layout, image="a.png", video="b")
        return len(runs)

    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").write_bytes(b"one")
    assert [asked(), asked()] == [1, 1]
    (tmp_path / "a.png").write_bytes(b"other")
    assert [asked(), asked()] == [2, 2]
    (tmp_path / "packs" / "manifest.json").write_text("{}")
    assert [asked(), asked()] == [3, 3]
    (tmp_path / "b" / "frame_1.png").write_bytes(b"one")
    assert [asked(), asked()] == [4, 4]


def test_transformers_needs_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task = write_question(tmp_path / "task.jsonl", "b")
    (tmp_path / "step_00000001").mkdir()
    words = [f"ours={tmp_path / 'step_00000001'}", "--tasks", str(task), "--out", str(tmp_path)]
    assert evaluate.main([*words, "--transformers"]) == 2
    assert "--transformers: no model is a Hugging Face folder" in capsys.readouterr().err
