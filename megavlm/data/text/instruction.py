"""The instruction of a sample as a Q-Former reads it, in the tokens of a tokenizer of its own
(InstructBLIP, arXiv 2305.06500, section 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megavlm.data.records.record import Turn
from megavlm.data.text.placeholders import without_images

NO_INSTRUCTION = np.zeros(0, np.int32)


class InstructionTokens:
    """Makes the tokens of instructions.

    Args:
        tokenizer: of the Q-Former, a fast one; all that it puts around a text is kept. None: there
            is none, which is refused.
        most: most tokens of an instruction; a longer one loses its beginning, but not the token
            that the tokenizer puts in front.

    Raises:
        ValueError: there is no such tokenizer, or no room for a text between the tokens around it.
    """

    def __init__(self, tokenizer: Any | None, most: int) -> None:
        if tokenizer is None:
            raise ValueError(
                "a Q-Former reads the instruction; name its tokenizer with --qformer_tokenizer"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"--qformer_tokenizer: {type(tokenizer).__name__} is no fast tokenizer; use one"
                " with a tokenizer.json"
            )
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.most = most
        around = len(tokenizer("")["input_ids"])
        if around >= most:
            raise ValueError(
                f"--instruction_length {most}: the tokenizer of --qformer_tokenizer puts {around}"
                " tokens around a text; use more"
            )

    def of(self, turns: Sequence[Turn]) -> np.ndarray:
        """Return the tokens of what the human says in a conversation, without its images; int32
        [m].
        """
        text = " ".join(without_images(turn.text) for turn in turns if turn.role == "human")
        ids = self.tokenizer(text.strip())["input_ids"]
        if len(ids) > self.most:
            ids = [ids[0], *ids[1 - self.most :]]
        return np.array(ids, np.int32)
