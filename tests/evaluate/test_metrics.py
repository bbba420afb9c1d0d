"""Metrics equal the official code on hundreds of answers, kept in tests/golden."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megavlm.evaluate.answer import Answer
from megavlm.evaluate.captions import cider, cider_of_words, words
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.short_answers import chosen_letter
from megavlm.evaluate.vqa_text import normalised

GOLDEN = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "golden" / "metrics.json.gz").read_bytes())
)
TEN = tuple("red" for _ in range(10))


def of_one(metric: str, prediction: str, *truth: str, choices: tuple[str, ...] = ()) -> float:
    """Return the figure of one answer."""
    answer = Answer(prediction=prediction, truth=truth, choices=choices)
    (value,) = METRICS[metric].score([answer]).each
    return value


@pytest.mark.parametrize("metric", ["vqa", "anls", "relaxed", "exact_match"])
def test_short_answers_equal_the_official_code(metric: str):
    rows = GOLDEN[metric]
    answers = [Answer(prediction=given, truth=tuple(truth)) for given, truth, _ in rows]
    expected = [value for _, _, value in rows]
    score = METRICS[metric].score(answers)
    assert len(rows) >= 200
    assert len({round(value, 3) for value in expected}) > 1
    assert score.each == pytest.approx(expected, abs=1e-12)
    assert score.figures["accuracy"] == pytest.approx(sum(expected) / len(rows))


def test_choices_equal_the_official_code():
    rows = GOLDEN["multiple_choice"]
    found = [
        of_one("multiple_choice", given, *truth, choices=tuple(choices))
        for given, truth, choices, _ in rows
    ]
    assert found == [value for *_, value in rows]


def test_pope_equals_the_official_code():
    for given, wanted, figures in GOLDEN["pope"]:
        answers = [
            Answer(prediction=one, truth=(other,)) for one, other in zip(given, wanted, strict=True)
        ]
        assert list(METRICS["pope"].score(answers).figures.values()) == pytest.approx(figures)


def test_pope_of_a_model_that_always_says_no():
    answers = [Answer(prediction="No.", truth=(truth,)) for truth in ("yes", "no", "no")]
    figures = METRICS["pope"].score(answers).figures
    assert figures == {
        "f1": 0,
        "accuracy": pytest.approx(2 / 3),
        "precision": 0,
        "recall": 0,
        "yes_ratio": 0,
    }


def test_pope_without_an_object_that_is_there():
    answers = [Answer(prediction=given, truth=(" No ",)) for given in ("No.", "Yes.", "no", "no")]
    figures = METRICS["pope"].score(answers).figures
    assert figures == {"f1": 0, "accuracy": 0.75, "precision": 0, "recall": 0, "yes_ratio": 0.25}


def test_cider_equals_the_official_code():
    for given, wanted, each in GOLDEN["cider"]:
        score = cider_of_words(
            [caption.split() for caption in given],
            [[caption.split() for caption in captions] for captions in wanted],
        )
        assert score.each == pytest.approx(each, abs=1e-9)


def test_cider_of_captions():
    truth = [("A dog runs.", "The dog is running"), ("Two cats!", "cats"), ("A man's hat", "hat")]
    same = [Answer(prediction=captions[0], truth=captions[:1]) for captions in truth]
    assert cider(same).figures["cider"] > 5
    assert cider(same[:1]).figures["cider"] == 0  # of one image every n-gram is in all captions
    empty = [Answer(prediction="", truth=captions) for captions in truth]
    assert cider(empty).figures["cider"] == 0


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("This isn't A dog's ball.", "this is n't a dog 's ball"),
        ("A two-way street; 1,000 cars!", "a two-way street 1,000 cars"),
        ("In the U.S. (far away)", "in the u.s. far away"),
        ("black/white, 50% off & more", "black/white 50 % off & more"),
        ("The dogs 's, we've, he'd", "the dogs 's we 've he 'd"),
        ("n't", "n't"),
        (
            "they\N{RIGHT SINGLE QUOTATION MARK}re \u00e9t\u00e9 \u732b",
            "they 're \u00e9t\u00e9 \u732b",
        ),
        ("", ""),
    ],
)
def test_words_of_a_caption(caption: str, expected: str):
    assert words(caption) == expected.split()


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_counts_people(matches: int):
    truth = (*TEN[:matches], *("blue" for _ in range(10 - matches)))
    expected = [0, 0.3, 0.6, 0.9, *(1 for _ in range(7))][matches]
    assert of_one("vqa", "Red.", *truth) == pytest.approx(expected)


def test_vqa_accuracy_of_another_number_of_people():
    assert of_one("vqa", "red", "red") == 1
    assert of_one("vqa", "red", "red", "blue") == 0.5
    assert of_one("vqa", "red", "red", "red", *10 * ["blue"]) == pytest.approx(2 / 3)
    assert of_one("vqa", "red", "red", "red", "blue", "blue", "green") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The cat's 3.5, two-way street?", "cat 's 3.5 2 way street"),
        ("", ""),
        ("None, zero or ten", "0 0 or 10"),
        ("an apple a day", "apple day"),
        # A sign is a space, unless it stands beside one anywhere in the answer as it was given.
        *((f"x{sign}y", "x y") for sign in ';/[]"{}()=+\\_-><@`!'),
        *((f"x{sign} y{sign}z", "x yz") for sign in ';/[]"{}()=+\\_-><@`!'),
        ("x-y -z", "xy z"),
        ("x-y\n-z", "xy z"),
        ("x-y\t-z", "xy z"),
        ("x-y- ", "x y"),
        ("x;-y-z", "x y z"),
        ("Mr. 3. of 4.5", "mr 3 of 4.5"),
        ("x" + 33 * ".", "x."),  # the server removes 32 periods
        ("dont", "don't"),
        ("arent at 5 oclock", "aren't at 5 o'clock"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("im ive id've", "im ive id've"),
    ],
)
def test_normal_form(answer: str, expected: str):
    """These are the rules of the EvalAI server of VQA v2, with its oversights."""
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("There are three dogs.", "3", 1),
        ("3", "three", 1),
        ("Twenty", "20", 1),
        ("3.5", "3", 0),
        ("A3", "3", 0),
        ("-3", "3", 0),
        (".3", "3", 0),
        ("3-4", "3", 0),
        ("1000003", "3", 0),
        ("9" * 5000, "3", 0),
        ("none", "0", 0),
        ("2 or 3", "3", 0),
        ("none", "many", 0),
    ],
)
def test_counts(prediction: str, truth: str, expected: float):
    assert of_one("count", prediction, truth) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<ref>dog</ref><box>[[100, 100, 300, 300]]</box>", 1),
        ("[0.1, 0.1, 0.3, 0.3]", 1),
        ("[[100, 100, 200, 300]]", 1),  # half of the union, exactly
        ("[[100, 100, 199, 300]]", 0),
        ("[[300, 300, 100, 100]]", 0),
        ("[[a, b, c, d]]", 0),
        ("no box", 0),
    ],
)
def test_boxes(prediction: str, expected: float):
    assert of_one("box", prediction, "[[100, 100, 300, 300]]") == expected


def test_boxes_overlap_in_width_and_height():
    assert of_one("box", "[0, 0, 500, 1000]", "[0, 0, 1000, 1000]") == 1  # half, to the last bit
    assert of_one("box", "[100, 100, 300, 600]", "[100, 400, 300, 600]") == 0
    assert of_one("box", "[100, 100, 600, 300]", "[400, 100, 600, 300]") == 0


def test_a_box_whose_numbers_sum_up_to_four_is_in_thousandths():
    assert of_one("box", "[0, 0, 2, 2]", "[[0, 0, 2, 2.5]]") == 1


def test_contained_answers():
    assert of_one("contains", "It says STOP\nHERE.", "stop here") == 1
    assert of_one("contains", "it says stop here", " Stop\nhere ") == 1
    assert of_one("contains", "stop", "stop here") == 0


def test_a_letter_wins_over_the_text_of_another_choice():
    assert chosen_letter("B. red", ("red", "blue")) == "B"
    assert chosen_letter("it is blue", ("red", "blue")) == "B"
    assert chosen_letter("(B) it is", ("red", "blue")) == "B"
    assert chosen_letter("(Both", ("red", "blue")) == "(Both"
    assert chosen_letter("it is Blue", ("red", "blue")) == "it is Blue"
    assert chosen_letter("Z", ("red", "blue")) == "Z"
    assert chosen_letter("", ("red", "blue")) == ""
    assert of_one("multiple_choice", "B.", " B ", choices=("red", "blue")) == 1
