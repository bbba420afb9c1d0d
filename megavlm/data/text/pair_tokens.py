"""The text of a pair of an image and its text, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

from megavlm.data.records.record import IMAGE_PLACEHOLDER, Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_format import ChatFormat


def pair_text(turns: Sequence[Turn], tiles: Sequence[int]) -> str:
    """Return the text of a pair, without its image.

    Args:
        turns: of the pair.
        tiles: of each image.

    Raises:
        RejectError: there is not one text, or not one image of one tile.
    """
    texts = [turn.text for turn in turns if turn.role in ("gpt", "pretrain")]
    if list(tiles) != [1] or len(texts) != 1:
        raise RejectError(
            "conversation",
            f"{len(texts)} texts and {len(tiles)} images of {sum(tiles)} tiles, but a pair is one"
            " image of one tile and one text",
        )
    return texts[0].replace(IMAGE_PLACEHOLDER, "").strip()


def pair_tokens(
    form: ChatFormat,
    text: str,
    most: int,
    *,
    tokenize: Callable[[str], list[int]],
    end: int,
    padding: int,
) -> list[int]:
    """Return the tokens of a text, with those that the tokenizer puts around it. What is too long
    loses its end, but not the last token, which ends a text.

    Args:
        form: the row of the table of templates.
        text: of the pair.
        most: tokens that are kept.
        tokenize: gives the tokens of a text.
        end: id of the token that ends a text.
        padding: id of the token that fills up a text.

    Raises:
        RejectError: the text has no token.
    """
    if not text:
        raise RejectError("empty_answer", "the text of the pair is empty")
    tokens = tokenize(form.pair_prompt + text)
    if form.ends_pair and tokens[-1:] != [end]:
        tokens = [*tokens, end]
    if len(tokens) > most:
        tokens = [*tokens[: most - 1], tokens[-1]]
    if form.fills_pair:
        tokens = [*tokens, *repeat(padding, most - len(tokens))]
    if len(tokens) < 2:
        raise RejectError("empty_answer", "the text of the pair has no token")
    return tokens
