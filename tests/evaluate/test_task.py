"""Tasks are read, and what is wrong with one is told with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megavlm.data.records.record import MediaFile, Video
from megavlm.evaluate.task import AskedVideo, read_task, read_tasks

QUESTION = dict(question="What?", answer="red")
RETRIEVAL = dict(image="a.png", answers=["red", "blue"], metric="retrieval")
ZERO_SHOT = dict(image="a.png", answer="red", metric="zero_shot")
CLASSES = dict(choices=["red", "blue"], templates=["a {}.", "{}"], metric="zero_shot")
PAIR = dict(question="A. x B. y", choices=["x", "y"], answer="A", metric="multiple_choice")


def write(folder: Path, *rows: dict | str, name: str = "exam.jsonl") -> Path:
    path = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_question_with_everything(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = dict(question="What?", image="a.png", answers=["red", "Red"], system="Be kind.")
    path = write(tmp_path, "", row | dict(id=7, category="colours", metric="vqa"))
    task = read_task(path)
    (question,) = task.questions
    assert (task.name, task.metric) == ("exam", "vqa")
    assert (question.name, question.line, question.category) == ("7", 2, "colours")
    assert [turn.text for turn in question.turns] == ["Be kind.", "<image>\nWhat?"]
    assert question.images == (tmp_path / "a.png",)
    assert question.truth == ("red", "Red")


def test_questions_about_videos(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = (
        dict(question="What?", video="a", frames=4, clip=[1, 2.5], answer="x"),
        dict(question="<video>, <image> or <video>?", video=["b", "a"], image="a.png", answer="x"),
    )
    first, second = read_task(write(tmp_path, *rows)).questions
    assert first.turns[0].text == "<video>\nWhat?"
    file = MediaFile(path=str(tmp_path / "a"))
    assert first.videos == (AskedVideo(video=Video(file=file, clip=(1.0, 2.5)), frames=4),)
    assert second.turns[0].text == rows[1]["question"]
    assert [(Path(one.video.file.path).name, one.frames) for one in second.videos] == [
        ("b", 16),
        ("a", 16),
    ]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((), ": has no question"),
        ((QUESTION | dict(video="gone.mp4"),), r":1: its video .*gone.mp4 is missing"),
        ((QUESTION | dict(frames=4),), r":1: has frames but no video; leave that out"),
        ((QUESTION | dict(question="<video>"),), r":1: has 1 <video> in its question, but 0 vid"),
        ((QUESTION | dict(video=".", frames=0),), r":1: frames is 0, not a number from 1 to 10485"),
        ((QUESTION | dict(video=".", frames=10**9),), r":1: frames is 1000000000, not a number"),
        ((QUESTION | dict(video=".", clip=[2, 1]),), r":1: clip \[2, 1\] is not \[start, end\]"),
        ((QUESTION | dict(video=[".", "."], question="<video>" * 2, clip=[1, 2]),), ":1: one clip"),
        (("{",), r":1: is not JSON"),
        (("[1]",), r":1: is not a JSON object"),
        ((QUESTION, dict(answer="x")), r":2: has no question"),
        ((dict(question="x"),), r":1: has no answer"),
        ((QUESTION | dict(answer=3),), r":1: answer is 3, not a text or a list of texts"),
        ((QUESTION | dict(question=3),), r":1: question is 3, not a text"),
        ((QUESTION | dict(answers=["x"]),), r":1: has both answer and answers"),
        ((QUESTION | dict(label="x"),), r":1: has label; the keys of a question are question,"),
        ((QUESTION | dict(image="gone.png"),), r":1: its image .*gone.png is missing"),
        ((QUESTION | dict(question="<image>"),), r":1: has 1 <image> in its question, but 0"),
        ((QUESTION | dict(metric="bleu"),), r": there is no metric bleu; the metrics are exact_"),
        ((QUESTION, QUESTION | dict(metric="vqa")), r"exact_match in line 1, vqa in line 2"),
        ((QUESTION | dict(id=1), QUESTION | dict(id=1)), r":1: 2 questions have the id 1"),
        ((QUESTION, QUESTION | dict(choices=["red", "x"])), r":2: has choices, but other"),
        ((QUESTION | dict(choices=["x", "y"]),), r":1: its answer 'red' is none of its choices"),
        ((PAIR | dict(answer="C"),), r":1: its answer 'C' is none of its choices"),
        ((PAIR | dict(choices=["x"]),), r":1: the metric multiple_choice needs choices"),
        ((PAIR | dict(choices=["B", "A"]),), r":1: its choice A is called B"),
        ((PAIR | dict(choices=[*map(str, range(27))]),), r":1: more than 26 choices"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, rows: tuple[dict | str, ...], told: str):
    path = write(tmp_path, *rows)
    with pytest.raises(ValueError, match=rf"^--eval.tasks {path}.*{told}"):
        read_task(path)


def test_two_tasks_of_one_name(tmp_path: Path):
    (tmp_path / "b").mkdir()
    paths = [write(folder, QUESTION) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(ValueError, match="2 files are called exam"):
        read_tasks(tuple(map(str, paths)))


def test_a_file_that_is_missing(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing.jsonl: cannot be read"):
        read_task(tmp_path / "nothing.jsonl")


def test_choices_are_listed_unless_the_question_lists_them(tmp_path: Path):
    asked = ("Which box, by size?", "Which, A. x or the other?")
    path = write(tmp_path, PAIR, *(PAIR | dict(question=text) for text in asked))
    first, *others = (question.turns[-1].text for question in read_task(path).questions)
    assert first == "A. x B. y"
    assert others == [f"{text}\nA. x\nB. y" for text in asked]


def test_a_line_may_hold_other_line_breaks(tmp_path: Path):
    line = json.dumps(dict(question="a\u2028b\x85c", answer="x"), ensure_ascii=False)
    (question,) = read_task(write(tmp_path, line)).questions
    assert question.turns[0].text == "a\u2028b\x85c"


def test_images_with_captions(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    task = read_task(write(tmp_path, RETRIEVAL | dict(category="indoors"), RETRIEVAL))
    assert task.is_of_pairs and not task.classes
    first, second = task.questions
    assert (first.truth, first.category, first.turns) == (("red", "blue"), "indoors", ())
    assert second.images == (tmp_path / "a.png",)


def test_classes_are_those_of_the_line_without_an_image_or_of_the_answers(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    task = read_task(write(tmp_path, ZERO_SHOT, CLASSES))
    assert (task.classes, task.templates) == (("red", "blue"), ("a {}.", "{}"))
    blue = ZERO_SHOT | dict(answer="blue")
    task = read_task(write(tmp_path, blue, ZERO_SHOT, blue))
    assert (task.classes, task.templates) == (("blue", "red"), ("{}",))
    task = read_task(write(tmp_path, dict(templates=["a {}"], metric="zero_shot"), ZERO_SHOT))
    assert (task.classes, task.templates) == (("red",), ("a {}",))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((RETRIEVAL | dict(question="What?"),), r":1: has question beside retrieval and an image"),
        ((dict(answer="x", metric="retrieval"),), r":1: has 0 images, but the metric retrieval"),
        ((RETRIEVAL | dict(answers=[" "]),), r":1: has an empty answer"),
        ((RETRIEVAL | dict(image="b.png"),), r":1: its image .*b.png is missing"),
        ((RETRIEVAL | dict(id=1), RETRIEVAL | dict(id=1)), r":1: 2 questions have the id 1"),
        ((ZERO_SHOT | dict(answer=["a", "b"]),), r":1: has 2 answers, but an image of zero_shot"),
        ((CLASSES, ZERO_SHOT | dict(answer="green")), r":2: its answer 'green' is no class"),
        ((CLASSES, CLASSES, ZERO_SHOT), r":2: has no image, and an earlier line names the classes"),
        ((CLASSES | dict(answer="red"), ZERO_SHOT), r":1: has answer but no image; leave that out"),
        ((CLASSES | dict(choices=["a", "a"]), ZERO_SHOT), r":1: its classes are not different"),
        ((CLASSES | dict(templates=["a"]), ZERO_SHOT), r":1: its template 'a' needs one {}"),
        ((dict(metric="zero_shot"), ZERO_SHOT), r":1: has no image, and neither choices"),
        ((CLASSES,), ": has no question"),
        ((QUESTION | dict(templates=["{}"]),), r":1: has templates, which only zero_shot takes"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(tmp_path: Path, rows: tuple, told: str):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=told):
        read_task(write(tmp_path, *rows))
