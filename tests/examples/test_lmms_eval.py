"""The task for lmms-eval asks what a task of ours asks, and scores it alike."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from megavlm.evaluate.answer import Answer
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.task import read_task

FOLDER = Path(__file__).parents[2] / "examples" / "lmms_eval"
ROWS = (
    dict(question="<image>\nWhich?", image="a.png", answer="one", system="Be short."),
    dict(question="Which?", image=["a.png"], answer="one"),
    dict(question="Is <image>\nor <image> red?", image=["a.png", "b.png"], answer="No"),
    dict(question="Who?", answer="one"),
)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("a", "b"):
        Image.new("RGB", (2, 2), dict(a="red", b="blue")[name]).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("questions", FOLDER / "questions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_conversations_are_those_of_the_task(questions: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for row, asked in zip(ROWS, read_task(tmp_path / "exam.jsonl").questions, strict=True):
        doc = dict.fromkeys(("image", "system")) | row  # datasets fills keys that a row lacks
        conversation = questions.messages(doc)
        assert [turn["role"] for turn in conversation] == [
            "user" if turn.role == "human" else turn.role for turn in asked.turns
        ]
        parts = conversation[-1]["content"]
        # The chat templates of exports write a line break behind each image.
        shown = "".join("<image>\n" if one["type"] == "image" else one["text"] for one in parts)
        expected = re.sub("<image>\n?", "<image>\n", asked.turns[-1].text)
        assert shown == expected
        pictures = [one["url"].getpixel((0, 0)) for one in parts if one["type"] == "image"]
        assert pictures == [Image.open(path).getpixel((0, 0)) for path in asked.images]


@pytest.mark.parametrize("said", ["no", " No\n", "no.", "yes", ""])
def test_scores_are_those_of_the_metric(questions: ModuleType, said: str) -> None:
    answer = Answer(prediction=said, truth=("No",))
    expected = METRICS["exact_match"].score([answer]).figures["accuracy"]
    assert questions.results(dict(answer="No"), [said]) == {"exact_match": expected}


def test_the_task_names_functions_that_exist(questions: ModuleType) -> None:
    named = re.findall(r"!function questions\.(\w+)", (FOLDER / "exam.yaml").read_text())
    assert len(named) == 4 and all(callable(getattr(questions, name)) for name in named)
