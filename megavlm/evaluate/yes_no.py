"""POPE (Li et al., arXiv 2305.10355): questions whether an object is in an image."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm.evaluate.answer import Answer, Score, mean


def says_yes(text: str) -> bool:
    """Tell whether an answer is a yes: its first sentence has none of the words No, no, not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope(answers: Sequence[Answer]) -> Score:
    """Return F1, accuracy, precision, recall, and how often the answer is yes. A figure whose
    divisor is 0 is 0.
    """
    given = [says_yes(answer.prediction) for answer in answers]
    wanted = [answer.truth[0].strip().lower() != "no" for answer in answers]
    right = tuple(float(one == other) for one, other in zip(given, wanted, strict=True))
    found = sum(one and other for one, other in zip(given, wanted, strict=True))
    precision = found / sum(given) if any(given) else 0.0
    recall = found / sum(wanted) if any(wanted) else 0.0
    both = precision + recall
    return Score(
        figures={
            "f1": 2 * precision * recall / both if both else 0.0,
            "accuracy": mean(right),
            "precision": precision,
            "recall": recall,
            "yes_ratio": sum(given) / len(given),
        },
        each=right,
    )
