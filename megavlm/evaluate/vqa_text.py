"""The normal form of short answers in which VQA accuracy compares them.

It is that of the EvalAI server of VQA v2, as the evaluators of TextVQA, LLaVA and InternVL have
taken it over, with what looks like oversights in it: published figures depend on them.
"""

from __future__ import annotations

import re

_NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        strict=True,
    ),
    ten="10",
)
_ARTICLES = frozenset(("a", "an", "the"))
# Commas and question marks are gone before.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# The server's pattern for a period that no digit follows; a digit in front makes no difference.
_PERIOD = re.compile(r"\.(?!\d)")
# The server passes a flag as the count of replacements.
_MOST_PERIODS = int(re.UNICODE)
_CONTRACTION_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    """Return the word with each of its apostrophes left out in turn."""
    return [word[:index] + word[index + 1 :] for index, sign in enumerate(word) if sign == "'"]


# The server's table maps ``somebody'd`` the other way round.
_CONTRACTED = {
    short: word for word in _CONTRACTION_WORDS.split() for short in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}
# And it names these in upper case, which no word has when it is looked up.
for _upper in ("i'd've", "i'm", "i've"):
    for _short in _without_one_apostrophe(_upper):
        del _CONTRACTED[_short]


def normalised(answer: str) -> str:
    """Return the normal form of an answer: lower case, digits for numbers up to ten, no articles,
    no punctuation, contractions with their apostrophes.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(
        _CONTRACTED.get(word, word)
        for word in (_NUMBERS.get(word, word) for word in _without_punctuation(text).split())
        if word not in _ARTICLES
    )


def _without_punctuation(text: str) -> str:
    """Remove a sign everywhere if it stands beside a space anywhere; otherwise put a space."""
    result = text
    for sign in _PUNCTUATION:
        is_beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if is_beside_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)
