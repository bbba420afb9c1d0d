"""Samples of two answers to one prompt: the one that is preferred, and beside it the rejected one,
which shows the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown
from megavlm.data.text.instruction import NO_INSTRUCTION


def with_rejected(
    chosen: Sample,
    turns: Sequence[Turn],
    rejected: Turn | None,
    template: ChatTemplate,
    tiles: Sequence[int],
    shown: Sequence[Shown],
) -> Sample:
    """Return a sample with that of the rejected answer beside it.

    Args:
        chosen: the sample of the preferred answer.
        turns: that its tokens were made of.
        rejected: the answer in the place of the last turn; None: the sample stays alone.
        template, tiles, shown: that its tokens were made with.

    Raises:
        RejectError: the answer holds a token of images, or both become the same tokens.
    """
    if rejected is None:
        return chosen
    tokens, supervised = template.encode((*turns[:-1], rejected), tiles, shown)
    _check_differ(chosen.tokens, tokens)
    other = dataclasses.replace(
        chosen,
        tokens=tokens,
        supervised=supervised,
        images=(),
        unread=(),
        instruction=NO_INSTRUCTION,
    )
    return dataclasses.replace(chosen, rejected=other)


def count_answers(
    turns: Sequence[Turn],
    rejected: Turn | None,
    template: ChatTemplate,
    tiles: Sequence[int],
    shown: Sequence[Shown],
) -> list[int]:
    """Return the tokens of a sample and, if there is a rejected answer, of the one with it, as
    ``with_rejected`` makes them, but faster; arguments and errors as there.
    """
    lengths = [template.count(turns, tiles, shown)]
    if rejected is not None:
        other = (*turns[:-1], rejected)
        lengths.append(template.count(other, tiles, shown))
        if lengths[0] == lengths[1]:
            _check_differ(*(template.encode(each, tiles, shown)[0] for each in (turns, other)))
    return lengths


def _check_differ(chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Refuse answers whose texts differ in what the template or the tokenizer does not keep, such
    as white space at their ends.
    """
    if np.array_equal(chosen, rejected):
        raise RejectError("same_answers", f"both become the same {len(chosen)} tokens")
