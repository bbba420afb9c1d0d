"""Ids of the tokens that the settings of a model name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megavlm.config.schema import Architecture
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextIds:
    """Ids of the tokens of a language model.

    Args:
        begin: the tokenizer's beginning of a text, or the padding token if it has none. Never
            null: ``generate`` of transformers 4.37 stops at a null before it looks at the
            embeddings that InternVLChatModel gives it.
        end: ends an answer.
        pad: fills up the texts of a batch.
    """

    begin: int
    end: int
    pad: int

    @property
    def text(self) -> dict[str, int]:
        """The tokens by their names in config.json."""
        return {"bos_token_id": self.begin, "eos_token_id": self.end, "pad_token_id": self.pad}


@dataclass(frozen=True, kw_only=True)
class TokenIds(TextIds):
    """Ids of the tokens of a language model that sees images.

    Args:
        image: stands for an image feature.
    """

    image: int


def token_ids(folder: Path, architecture: Architecture, template: str) -> TokenIds:
    """Ids of the tokens that matter, in the tokenizer of a folder.

    Raises:
        ValueError: the tokenizer lacks one, or knows more tokens than the model.
    """
    tokenizer = load_tokenizer(folder)
    known = tokenizer.get_vocab()
    row = FORMATS.get(template)
    markers = row.markers if row else ()
    images = IMAGE_TOKEN_SETS[architecture.image_tokens]
    missing = [token for token in (*images.added, *markers) if token not in known]
    if missing:
        raise ValueError(
            f"--tokenizer {folder}: lacks {', '.join(missing)}; take the folder tokenizer/ of the"
            " packed dataset"
        )
    if max(known.values()) >= architecture.language.vocab_size:
        highest = max(known.values())
        rows = architecture.language.vocab_size
        raise ValueError(
            f"--tokenizer {folder}: has ids up to {highest}, and the model's vocabulary has {rows}"
            " rows"
        )
    if row:
        end = tokenizer(row.final_end, add_special_tokens=False)["input_ids"][-1]
    elif tokenizer.eos_token_id is not None:
        end = tokenizer.eos_token_id
    else:
        raise ValueError(f"--tokenizer {folder}: has no eos_token, which ends an answer")
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    begin = pad if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return TokenIds(image=known[images.context], begin=begin, end=end, pad=pad)
