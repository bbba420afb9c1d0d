"""Examples in front of questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.evaluate.packs import requests_of
from megavlm.evaluate.shots import with_shots
from megavlm.evaluate.task import read_tasks
from tests.evaluate.test_task import write

WORDS = Path(__file__).parents[1] / "golden" / "llava_tokenizer"


def _files(folder: Path) -> tuple[str, str]:
    """Write a task of two questions, and five examples, one of which is asked too."""
    for number in range(5):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")
    rows = [
        dict(question="Which?", image=f"{number}.png", answer=f"shade {number}")
        for number in range(5)
    ]
    return str(write(folder, *rows[:2])), str(write(folder, *rows, name="examples.jsonl"))


def test_fewer_examples_are_the_first_of_more_and_never_the_question_itself(tmp_path: Path) -> None:
    task, examples = _files(tmp_path)
    bare, two, four = with_shots(read_tasks((task,)), examples, (0, 2, 4))
    assert [one.name for one in (bare, two, four)] == ["exam", "exam_2_shots", "exam_4_shots"]
    for plain, some, many in zip(bare.questions, two.questions, four.questions, strict=True):
        assert many.images[:2] == some.images[:2] and many.turns[:4] == some.turns[:4]
        assert some.images[-1] == many.images[-1] == plain.images[0] not in many.images[:-1]
        assert many.turns[-1] == plain.turns[-1] and many.truth == plain.truth
        assert [turn.role for turn in some.turns] == ["human", "gpt"] * 2 + ["human"]
        shown = [image.stem for image in many.images[:-1]]
        assert [turn.text for turn in many.turns[1::2]] == [f"shade {name}" for name in shown]
        # The tokens of a choice are those that count, and no example's.
        assert not any(turn.learned for turn in many.turns if turn.role == "gpt")
    assert with_shots((bare,), "", ()) == (bare,)


def test_each_image_of_a_prompt_has_its_own_tokens(tmp_path: Path) -> None:
    task, examples = _files(tmp_path)
    [four] = with_shots(read_tasks((task,)), examples, (4,))
    tokenizer = load_tokenizer(WORDS)
    add_special_tokens(tokenizer, "idefics")
    template = ChatTemplate(tokenizer, 1, name="flamingo")
    tiling = Tiling(tile_size=8, max_tiles=1, mode="stretch")
    [request] = requests_of(four, four.questions[0], template, tiling)
    assert np.count_nonzero(request.tokens == template.context_token_id) == 5 == len(request.images)
    assert tokenizer.decode(request.tokens).count("Answer: shade") == 4


def test_videos_of_examples_come_before_that_of_the_question(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = [dict(question="Which?", video=name, answer=name) for name in ("a", "b")]
    files = str(write(tmp_path, *rows)), str(write(tmp_path, *rows, name="examples.jsonl"))
    [one] = with_shots(read_tasks(files[:1]), files[1], (1,))
    shown = [[Path(each.video.file.path).name for each in asked.videos] for asked in one.questions]
    assert shown == [["b", "a"], ["a", "b"]]


def test_a_system_message_stays_in_front(tmp_path: Path) -> None:
    _, examples = _files(tmp_path)
    task = str(write(tmp_path, dict(question="What?", answer="x", system="Be brief.")))
    [one] = with_shots(read_tasks((task,)), examples, (1,))
    roles = [turn.role for turn in one.questions[0].turns]
    assert roles == ["system", "human", "gpt", "human"]
    # That of an example is left out.
    [one] = with_shots(read_tasks((examples,)), task, (1,))
    assert [turn.text for turn in one.questions[0].turns] == [
        "What?",
        "x",
        "<image>\nWhich?",
    ]


def test_each_question_has_examples_of_its_own(tmp_path: Path) -> None:
    rows = [dict(question=f"Number {number}?", answer="x") for number in range(40)]
    task = str(write(tmp_path, *rows[:20]))
    examples = str(write(tmp_path, *rows[20:], name="examples.jsonl"))
    one, again = (with_shots(read_tasks((task,)), examples, (1,)) for _ in range(2))
    assert one == again
    assert len({question.turns[0].text for question in one[0].questions}) > 8


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    task, examples = _files(tmp_path)
    with pytest.raises(ValueError, match="--eval.examples .*: has 4 questions .* asks for 5"):
        with_shots(read_tasks((task,)), examples, (5,))


def test_examples_with_choices_show_them_and_answer_with_a_letter(tmp_path: Path) -> None:
    def row(number: int, answer: str) -> dict:
        choices = [f"{number} cats", f"{number} dogs"]
        return dict(question="Which?", choices=choices, answer=answer, metric="multiple_choice")

    task = str(write(tmp_path, row(0, "A")))
    examples = str(write(tmp_path, row(1, "1 dogs"), row(2, "A"), name="examples.jsonl"))
    [two] = with_shots(read_tasks((task,)), examples, (2,))
    turns = two.questions[0].turns
    shown = {one.text: other.text for one, other in zip(turns[:4:2], turns[1:4:2], strict=True)}
    assert shown == {"Which?\nA. 1 cats\nB. 1 dogs": "B", "Which?\nA. 2 cats\nB. 2 dogs": "A"}


def test_examples_of_metrics_without_letters_answer_with_the_text_of_a_choice(
    tmp_path: Path,
) -> None:
    """Texts may be letters of other choices."""
    row = dict(choices=["B", "A"], answer="A", metric="exact_match")
    task = str(write(tmp_path, row | dict(question="Which?")))
    examples = str(write(tmp_path, row | dict(question="What?"), name="examples.jsonl"))
    [one] = with_shots(read_tasks((task,)), examples, (1,))
    assert [turn.text for turn in one.questions[0].turns] == ["What?", "A", "Which?"]


def test_examples_that_do_not_fit_are_told_by_their_own_flag(tmp_path: Path) -> None:
    task, examples = _files(tmp_path)
    tasks = read_tasks((task,))
    other = write(tmp_path, dict(question="Which?", answer="a", metric="vqa"), name="vqa.jsonl")
    with pytest.raises(ValueError, match=r"--eval.examples .*vqa, but that of .* is exact_match"):
        with_shots(tasks, str(other), (1,))
    broken = write(tmp_path, dict(question="Which?"), name="broken.jsonl")
    with pytest.raises(ValueError, match=r"^--eval.examples .*broken.jsonl:1: has no answer"):
        with_shots(tasks, str(broken), (1,))
    row = dict(question="Which?", answer="a")
    same = read_tasks((task, str(write(tmp_path, row, name="exam_4_shots.jsonl"))))
    with pytest.raises(ValueError, match="2 tasks would be called exam_4_shots"):
        with_shots(same, examples, (0, 4))
