"""The table of metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megavlm.evaluate import short_answers
from megavlm.evaluate.answer import Answer, Score, mean
from megavlm.evaluate.captions import cider
from megavlm.evaluate.yes_no import pope


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table.

    Args:
        score: measures answers.
        measures: what for, in a few words.
        figures: names of its figures, the one that a model is judged by first.
        needs_choices: whether every question has choices, which it lists with letters.
    """

    score: Callable[[Sequence[Answer]], Score]
    measures: str
    figures: tuple[str, ...] = ("accuracy",)
    needs_choices: bool = False

    def choice(self, index: int, text: str) -> str:
        """Return what an answer says that takes a choice."""
        return short_answers.LETTERS[index] if self.needs_choices else text


def _mean_of(of_one: Callable[[Answer], float]) -> Callable[[Sequence[Answer]], Score]:
    """Make a metric of the mean of what one answer gets."""

    def score(answers: Sequence[Answer]) -> Score:
        each = tuple(map(of_one, answers))
        return Score(figures={"accuracy": mean(each)}, each=each)

    return score


_POPE = ("f1", "accuracy", "precision", "recall", "yes_ratio")
METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        score=_mean_of(short_answers.exact_match), measures="answers of one wording (GQA)"
    ),
    "vqa": Metric(
        score=_mean_of(short_answers.vqa_accuracy),
        measures="ten people's answers (VQA v2, TextVQA, OK-VQA, VizWiz)",
    ),
    "anls": Metric(score=_mean_of(short_answers.anls), measures="text in documents (DocVQA)"),
    "relaxed": Metric(
        score=_mean_of(short_answers.relaxed_accuracy), measures="numbers in charts (ChartQA)"
    ),
    "contains": Metric(
        score=_mean_of(short_answers.contains), measures="text somewhere in the answer (OCRBench)"
    ),
    "multiple_choice": Metric(
        score=_mean_of(short_answers.multiple_choice),
        measures="letters of choices (MMBench, ScienceQA, AI2D)",
        needs_choices=True,
    ),
    "count": Metric(score=_mean_of(short_answers.count_accuracy), measures="how many there are"),
    "box": Metric(
        score=_mean_of(short_answers.box_accuracy), measures="boxes of what is named (RefCOCO)"
    ),
    "pope": Metric(score=pope, measures="objects that are there or not (POPE)", figures=_POPE),
    "cider": Metric(score=cider, measures="captions (COCO, NoCaps, Flickr30k)", figures=("cider",)),
}
