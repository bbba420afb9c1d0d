"""Tokens that a config.json names by their ids, compared with the tokenizer beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.convert.hf import tokenizer_files
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import FILE_NAME, read_complete
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer

# What classes call the id of the placeholder token.
_IMAGE = ("image_token_index", "image_token_id")


def check(folder: Path, copy: Path, image_tokens: str) -> None:
    """Compare the token that stands for images, and the end of a CLIP's texts. A token that the
    tokenizer lacks is not compared.

    Args:
        folder: of the model and its tokenizer.
        copy: folder that the tokenizer was copied to, in a form that can be read.
        image_tokens: row of ``IMAGE_TOKEN_SETS``.

    Raises:
        ValueError: they disagree; both files are named.
    """
    wrong = list(_problems(folder, copy, image_tokens))
    if wrong:
        files = [name for name in tokenizer_files.FILES if (folder / name).is_file()]
        raise ValueError(
            f"{folder / FILE_NAME} and {folder / files[0]} disagree: {'; '.join(wrong)}; correct"
            " the id, or name the folder of the tokenizer that the model was trained with"
            " (--tokenizer of import)"
        )


def image_token_id(folder: Path) -> int | None:
    """Return the id of the token that stands for images, as config.json names it; none: it does not
    name one.
    """
    settings = read_complete(folder / FILE_NAME)
    return next((settings[name] for name in _IMAGE if settings.get(name) is not None), None)


def _problems(folder: Path, words: Path, image_tokens: str) -> Iterator[str]:
    settings = read_complete(folder / FILE_NAME)
    tokenizer = load_tokenizer(words)
    token = IMAGE_TOKEN_SETS[image_tokens].context
    there = tokenizer.get_vocab().get(token)
    for name in _IMAGE:
        if there is not None and settings.get(name) not in (None, there):
            yield f"{name} is {settings[name]}, and the tokenizer's {token} is {there}"
    end_problems = hub_format_of(folder).end_problems
    if end_problems is not None:
        yield from end_problems(settings, tokenizer)
