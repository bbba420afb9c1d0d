"""From conversations to tokens: the chat template ``internvl2_5`` and its tokenizer. The only module of ``data`` that imports transformers.

A sample reads ``<|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n``; an
image is ``<img>``, one ``<IMG_CONTEXT>`` a feature, ``</img>``. Answers and the ``<|im_end|>`` behind them are supervised, nothing else is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megavlm.data.record import IMAGE_PLACEHOLDER, Turn
from megavlm.data.reject import RejectError

NAME = "internvl2_5"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# What InternVL 2.5 is told where a conversation has no system turn of its own.
SYSTEM_MESSAGE = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"

# The same text for Hugging Face's apply_chat_template; an image becomes one <IMG_CONTEXT>, which the processor of InternVL expands.
HF_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + SYSTEM_MESSAGE + "<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Scripts, digits, white space, code and special tokens: two tokenizers that cut this alike and share a vocabulary are one.
PROBE = (
    "The 3 quick brown foxes didn't jump: 12,345.67 + 89 = ?\n\n\tdef f(x):  return x ** 2\r\n"
    "InternVL 你好，世界 naïve Straße Ελλάδα Привет العربية 한국어 🙂👍🏽 e\u0301 \u00e9 \ufb01 "
    + TURN_START + " text " + IMAGE_START + IMAGE_CONTEXT + IMAGE_END + "<box>[[12, 34, 560, 780]]</box>" + TURN_END + "\n"
)  # fmt: skip


def load_tokenizer(folder: str | Path, flag: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, never fetched from elsewhere, and never with Python code of its own; ``flag`` names the folder in errors.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no tokenizer that transformers can read.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{flag} {folder}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{flag} {folder}: holds no readable tokenizer: {text:.300}") from None


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add those of InternVL's nine special tokens that are missing, in InternVL's order, and return how many were."""
    return tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)


def extend(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Add InternVL's special tokens, and return the ids of those that were missing."""
    before = set(tokenizer.get_vocab().values())
    add_special_tokens(tokenizer)
    return tuple(sorted(set(tokenizer.get_vocab().values()) - before))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does: its vocabulary, and its tokens for a text of many kinds.

    It does not depend on how the files are written, so it outlives saving, loading and new versions of transformers.
    """
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE, add_special_tokens=False)["input_ids"]]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()[:32]


class ChatTemplate:
    """The template ``internvl2_5`` with a tokenizer.

    Args:
        tokenizer: has the special tokens of ``add_special_tokens``, and adds none of its own in front of a text.
        features_per_tile: ``<IMG_CONTEXT>`` tokens of one tile.
        system_message: what a conversation without a system turn begins with.

    Raises:
        ValueError: the tokenizer lacks a token, or starts texts with a token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, features_per_tile: int, *, system_message: str = SYSTEM_MESSAGE) -> None:
        self.tokenizer = tokenizer
        self.features_per_tile = features_per_tile
        self.system_message = system_message
        self.context_token_id = self._token_id(IMAGE_CONTEXT)
        self.end_token_id = self._token_id(TURN_END)
        for token in (TURN_START, *SPECIAL_TOKENS):
            self._token_id(token)
        if tokenizer("a")["input_ids"] != self._tokens(["a"])[0]:
            raise ValueError(
                f"the tokenizer starts a text with {tokenizer('')['input_ids']}; {NAME} is for tokenizers that add nothing, like Qwen2.5's"
            )
        self._answer_start = len(self._tokens([_open_turn("gpt")])[0])

    def encode(self, turns: Sequence[Turn], tiles: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [T], and the supervised mask, bool [T], of a conversation.

        Args:
            turns: system (optional), human, gpt, human, gpt, ...
            tiles: tiles of each image, thumbnail counted, in the order of the placeholders.

        Raises:
            RejectError: not as many placeholders as images, or an image's token in a text.
        """
        turns = self._with_system(turns)
        _check_placeholders(turns, len(tiles))
        # Turns are tokenised apart, as InternVL does: a merge over their border would make other tokens.
        pieces = self._tokens([_open_turn(turn.role) + _place_images(turn) + _close_turn() for turn in turns])
        masks = []
        for turn, piece in zip(turns, pieces, strict=True):
            mask = np.zeros(len(piece), bool)
            if turn.role == "gpt":
                mask[self._answer_start : -1] = True  # the last token is the newline behind <|im_end|>
            masks.append(mask)
        return self._expand(np.fromiter(chain.from_iterable(pieces), np.int32), np.concatenate(masks), tiles)

    def prompt(self, question: str | Sequence[Turn], tiles: Sequence[int] = ()) -> np.ndarray:
        """Tokens, int32 [T], up to where the answer begins: the start of what ``encode`` makes of the same conversation.

        Args:
            question: the human's text, or the turns up to a human one. One image without a placeholder goes first, on its own line.
            tiles: tiles of each image, thumbnail counted, in the order of the placeholders.

        Raises:
            RejectError: not as many placeholders as images, or an image's token in a text.
        """
        if isinstance(question, str):
            alone = len(tiles) == 1 and IMAGE_PLACEHOLDER not in question
            question = [Turn(role="human", text=f"{IMAGE_PLACEHOLDER}\n{question}" if alone else question)]
        tokens, _ = self.encode(question, tiles)
        return np.concatenate([tokens, np.array(self._tokens([_open_turn("gpt")])[0], np.int32)])

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of an answer's tokens, without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns, with a system turn in front."""
        return list(turns) if turns[0].role == "system" else [Turn(role="system", text=self.system_message), *turns]

    def _expand(self, tokens: np.ndarray, supervised: np.ndarray, tiles: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """One context token for each image turned into one for each of its features."""
        repeats = np.ones(len(tokens), np.int64)
        # Each placeholder became one context token, and no text holds another.
        repeats[tokens == self.context_token_id] = np.asarray(tiles, np.int64) * self.features_per_tile
        return np.repeat(tokens, repeats), np.repeat(supervised, repeats)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _token_id(self, token: str) -> int:
        """The id of a special token."""
        ids: Any = self._tokens([token])[0]
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no token {token}; {NAME} is made for tokenizers of the Qwen2.5 family")
        return ids[0]


def _open_turn(role: str) -> str:
    """What stands in front of a turn's text."""
    return f"{TURN_START}{ROLES[role]}\n"


def _close_turn() -> str:
    """What stands behind a turn's text."""
    return f"{TURN_END}\n"


def _place_images(turn: Turn) -> str:
    """A turn's text with one context token for each image; only humans show images."""
    return turn.text.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_CONTEXT + IMAGE_END) if turn.role == "human" else turn.text


def _check_placeholders(turns: Sequence[Turn], images: int) -> None:
    """Refuse texts that hold an image's tokens, and more or fewer placeholders than images."""
    for turn in turns:
        for token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT):
            if token in turn.text:
                raise RejectError("image_token_in_text", f"a {turn.role} turn holds {token} {turn.text.count(token)} times")
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")
    if placeholders != images:
        raise RejectError("placeholder_count", f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the human turns, but {images} images")
