"""Metrics of short answers, each of one answer: from 0 to 1."""

from __future__ import annotations

import re

from megavlm.evaluate.answer import Answer
from megavlm.evaluate.vqa_text import normalised

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COUNTS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_COUNT = re.compile(rf"(?<![\w.,-])(\d{{1,18}}|{'|'.join(_COUNTS)})(?![\w-]|[.,]\d)", re.IGNORECASE)
_BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_LEAST_OVERLAP = 0.5
_LEAST_SIMILARITY = 0.5
_MOST_RELATIVE_ERROR = 0.05


def vqa_accuracy(answer: Answer) -> float:
    """Soft accuracy of VQA v2 (Goyal et al., arXiv 1612.00837), also of TextVQA, OK-VQA, VizWiz.

    Of ten answers by people, each is left out in turn: an answer that three of the other nine gave
    is right, one that fewer gave is right in part. With another number of answers, where the
    official evaluators fail, it is min(1, matches / 3); a single one has to match.
    """
    given = normalised(answer.prediction)
    matches = [normalised(truth) for truth in answer.truth].count(given)
    count = len(answer.truth)
    if count != 10:
        return min(1.0, matches / min(3, count))
    with_it = matches * min(1.0, (matches - 1) / 3)
    return (with_it + (count - matches) * min(1.0, matches / 3)) / count


def exact_match(answer: Answer) -> float:
    """Return 1 for an answer that equals a right one but for case and spaces around it."""
    given = answer.prediction.strip().lower()
    return float(any(given == truth.strip().lower() for truth in answer.truth))


def contains(answer: Answer) -> float:
    """Return 1 for an answer that holds a right one, without regard to case (OCRBench)."""
    given = answer.prediction.lower().strip().replace("\n", " ")
    return float(any(truth.lower().strip().replace("\n", " ") in given for truth in answer.truth))


def anls(answer: Answer) -> float:
    """Average normalised Levenshtein similarity (Biten et al., arXiv 1905.13648) of DocVQA and
    InfographicVQA: that of the most similar right answer, 0 below one half.

    As in the official evaluator, edits are counted in texts whose spaces are collapsed, but are
    divided by the length of the longer text as it was.
    """
    nearest = min(_relative_edits(truth, answer.prediction) for truth in answer.truth)
    similarity = 1 - nearest
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def _relative_edits(one: str, other: str) -> float:
    longest = max(len(one.upper()), len(other.upper()))
    if not longest:
        return 0.0
    edits = _edits(" ".join(one.lower().split()), " ".join(other.lower().split()))
    return edits / longest


def _edits(one: str, other: str) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and replacements."""
    row = list(range(len(other) + 1))
    for count, sign in enumerate(one, 1):
        before = row
        row = [count]
        for index, there in enumerate(other):
            replaced = before[index] + (sign != there)
            row.append(min(replaced, before[index + 1] + 1, row[index] + 1))
    return row[-1]


def relaxed_accuracy(answer: Answer) -> float:
    """Accuracy of ChartQA (Masry et al., arXiv 2203.10244): a number may be off by 5% of the right
    one; anything else, and what should be 0, has to be equal but for case.
    """
    return float(any(_is_near(truth, answer.prediction) for truth in answer.truth))


def _is_near(truth: str, prediction: str) -> bool:
    wanted = _number(truth)
    given = _number(prediction)
    if given is None or not wanted:
        return prediction.lower() == truth.lower()
    return abs(given - wanted) / abs(wanted) <= _MOST_RELATIVE_ERROR


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def multiple_choice(answer: Answer) -> float:
    """Return 1 for the right choice, as InternVL reads answers to MMBench and ScienceQA: a letter
    in front, or the text of a choice anywhere in it. The truth is a letter or a choice's text.
    """
    letters = LETTERS[: len(answer.choices)]
    wanted = {
        letters[answer.choices.index(truth)] if truth in answer.choices else truth.strip()
        for truth in answer.truth
    }
    return float(chosen_letter(answer.prediction, answer.choices) in wanted)


def chosen_letter(prediction: str, choices: tuple[str, ...]) -> str:
    """Return the letter of the choice that an answer takes; what it says if that is none."""
    text = prediction.strip()
    letters = LETTERS[: len(choices)]
    if len(text) < 2 or text[0] in letters:
        return text[:1]
    for letter, choice in zip(letters, choices, strict=True):
        if choice in text:
            return letter
    if text[1] == ".":
        return text[0]
    return text[1] if text[0] == "(" and text[2:3] == ")" else text


def count_accuracy(answer: Answer) -> float:
    """Return 1 for an answer whose first whole number, in digits or in a word up to twenty, is that
    of a right one.
    """
    given = _count(answer.prediction)
    return float(given is not None and any(given == _count(truth) for truth in answer.truth))


def _count(text: str) -> int | None:
    found = _COUNT.search(text)
    if found is None:
        return None
    word = found[1].lower()
    return _COUNTS.index(word) if word in _COUNTS else int(word)


def box_accuracy(answer: Answer) -> float:
    """Return 1 for a box that overlaps the right one by half of their union or more (RefCOCO).

    A box is ``[[x1, y1, x2, y2]]`` in thousandths of the image's width and height; a prediction
    whose numbers sum up to less than 4 is one in fractions of them, as in InternVL's evaluator.
    """
    given = _box(answer.prediction)
    return float(any(_overlap(given, _box(truth)) >= _LEAST_OVERLAP for truth in answer.truth))


def _box(text: str) -> tuple[float, ...]:
    """Read the first box of a text, in fractions of the image; without area if there is none."""
    found = _BOX.search(text)
    try:
        box = tuple(map(float, found.groups())) if found else ()
    except ValueError:
        box = ()
    if len(box) != 4:
        return (0.0, 0.0, 0.0, 0.0)
    return tuple(edge / 1000 for edge in box) if sum(box) >= 4 else box


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the intersection over the union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union > 0 else 0.0
