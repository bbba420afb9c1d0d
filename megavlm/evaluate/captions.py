"""CIDEr-D of captions (Vedantam et al., arXiv 1411.5726).

The figure depends on the captions of all images that are evaluated: n-grams that are in the
captions of few images weigh more. So that of a part of a dataset cannot be compared with that of
the whole, and that of one image is 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from megavlm.evaluate.answer import Answer, Score, mean

_LONGEST = 4
_SIGMA = 6.0
_WORD = re.compile(
    r"(?:[a-z]\.){2,}"  # u.s.
    r"|\d+(?:[.,:/]\d+)*"
    r"|[^\W\d_][\w]*(?:[-/'][\w]+)*"
    r"|'s|[$&%#+=@]"
)
_ENDING = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))$")

Vectors = list[dict[tuple[str, ...], float]]
"""For each length of n-grams, their weights."""


def words(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation, nearly as the Penn Treebank's
    tokenizer does, which the published figures were made with and which needs Java.
    """
    found = _WORD.findall(caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [piece for word in found for piece in _ENDING.sub(r" \1", word).split()]


def cider(answers: Sequence[Answer]) -> Score:
    """Return CIDEr-D, which is 10 for captions that equal all their references."""
    return cider_of_words(
        [words(answer.prediction) for answer in answers],
        [[words(truth) for truth in answer.truth] for answer in answers],
    )


def cider_of_words(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Score:
    """Return CIDEr-D of captions that are split into words.

    Args:
        predictions: a caption for each image.
        references: the right captions of each image.
    """
    wanted = [[_n_grams(caption) for caption in captions] for captions in references]
    images_with = Counter(gram for captions in wanted for gram in set().union(*captions))
    rarity = {gram: math.log(len(wanted)) - math.log(count) for gram, count in images_with.items()}
    unseen = math.log(len(wanted))
    each = tuple(
        10.0 * mean(tuple(_similarity(_n_grams(given), caption, rarity, unseen) for caption in own))
        for given, own in zip(predictions, wanted, strict=True)
    )
    return Score(figures={"cider": mean(each)}, each=each)


def _n_grams(caption: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Count the n-grams of one to four words."""
    return Counter(
        tuple(caption[start : start + length])
        for length in range(1, _LONGEST + 1)
        for start in range(len(caption) - length + 1)
    )


def _similarity(
    given: Counter[tuple[str, ...]],
    wanted: Counter[tuple[str, ...]],
    rarity: dict[tuple[str, ...], float],
    unseen: float,
) -> float:
    """Return the mean over the lengths of n-grams of the clipped cosine of two captions, less for
    captions of different length.
    """
    ours = _weights(given, rarity, unseen)
    theirs = _weights(wanted, rarity, unseen)
    # The official code takes the number of pairs of words for the length.
    difference = _pairs(given) - _pairs(wanted)
    penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
    return penalty * sum(map(_clipped_cosine, ours, theirs)) / _LONGEST


def _weights(
    grams: Counter[tuple[str, ...]], rarity: dict[tuple[str, ...], float], unseen: float
) -> Vectors:
    vectors: Vectors = [{} for _ in range(_LONGEST)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
    return vectors


def _clipped_cosine(given: dict[tuple[str, ...], float], wanted: dict) -> float:
    shared = sum(
        min(weight, wanted[gram]) * wanted[gram] for gram, weight in given.items() if gram in wanted
    )
    lengths = math.hypot(*given.values()) * math.hypot(*wanted.values())
    return shared / lengths if lengths else shared


def _pairs(grams: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)
