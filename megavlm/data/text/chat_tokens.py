"""From conversations to tokens: a template of ``templates`` with a tokenizer.

An image becomes the template's image tokens, such as ``<img>``, one ``<IMG_CONTEXT>`` a feature,
``</img>``. Answers with their end are supervised; of a ``pretrain`` text everything but images is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megavlm.data.records.record import IMAGE_PLACEHOLDER, SHOWING_ROLES, Turn
from megavlm.data.text.documents import learned_behind_image, with_chunk_ends
from megavlm.data.text.image_rows import Shown, expand, extents
from megavlm.data.text.instruction import NO_INSTRUCTION, InstructionTokens
from megavlm.data.text.pair_tokens import pair_text, pair_tokens
from megavlm.data.text.placeholders import (
    check_placeholders,
    check_single,
    with_image_first,
    without_images,
)
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import first_tokens
from megavlm.data.text.word_tokens import WordTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "internvl2_5"


class ChatTemplate:
    """A row of the table of templates with a tokenizer.

    Args:
        tokenizer: has the special tokens of ``add_special_tokens``; in front of a text it adds
            nothing, or its ``bos_token``.
        features_per_tile: context tokens of one tile.
        name: of the row.
        system_message: what a conversation without a system turn begins with; None: the row's;
            empty: nothing, not even an empty system turn.
        pair_length: most tokens of the text of a pair; 0: the row's.
        qformer_tokenizer: of the instruction that a Q-Former reads, if the row has one.
        instruction_length: most tokens of an instruction, in either tokenizer; 0: the row's.

    Raises:
        ValueError: the tokenizer lacks a token, adds other ones of its own, or cannot say where its
            tokens stand in a text; or there is no tokenizer for instructions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        features_per_tile: int,
        *,
        name: str = DEFAULT,
        system_message: str | None = None,
        pair_length: int = 0,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        instruction_length: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.features_per_tile = features_per_tile
        self.format = chat_format(name)
        self.system_message = (
            self.format.system_message if system_message is None else system_message
        )
        self.pair_length = pair_length or self.format.pair_length
        if not tokenizer.is_fast and not self.format.is_of_pairs:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets of its"
                " tokens; use one with a tokenizer.json"
            )
        # The folder of a tokenizer may ask for either; a record is never cut, and never filled up.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self.first_tokens = self._find_first_tokens()
        self.context_token_id = -1
        self.instructions = None
        self.instruction_length = instruction_length or self.format.instruction_length
        if self.format.is_of_pairs:
            return
        if self.instruction_length:
            self.instructions = InstructionTokens(qformer_tokenizer, self.instruction_length)
        images = self.format.images
        for token in (*self.format.markers, *images.added):
            self._token_id(token)
        self.context_token_id = self._token_id(images.context)
        self.newline_token_id = self._token_id(images.newline) if images.newline else None
        ends = self._tokens([self.format.final_end, self.format.end])
        # Of an answer that ends a conversation, and of any answer.
        self.end_token_id = ends[0][-1]
        self.end_token_ids = frozenset(found[-1] for found in ends)
        # A space alone is a part of the first token of the text.
        self._start_tokens = self._tokens([self.format.start.strip()])[0]
        self._refused = (*images.shown, *filter(None, [self.format.chunk_end]))
        self._image_token_ids = [self._token_id(token) for token in images.shown]
        self._opening_tokens = self._tokens([self.format.opening])[0]
        end, whole = self._tokens([self.format.end, self.format.end + self.format.closing])
        self._words = WordTokens(tokenizer.backend_tokenizer)
        self._first_count = self.format.end, len(end)
        # What a conversation began with last, and its tokens.
        self._first = self.format.end, np.array(end, np.int32)
        # Alone, a text may begin with a token for a space.
        self._closing_length = len(whole) - len(end)

    def _find_first_tokens(self) -> list[int]:
        """Return the tokens that begin a text; a pair keeps those of its tokenizer, so none."""
        if self.format.first_token:
            return [self._token_id(self.format.first_token)]
        if self.format.is_of_pairs:
            return []
        found = first_tokens(self.tokenizer)
        needs_one = self.format.gathers_images and not self.format.instruction_length
        if found or not needs_one:
            return found
        if self.tokenizer.bos_token_id is None:
            raise ValueError(
                f"the tokenizer has no bos_token, which --template {self.format.name} needs behind"
                " images"
            )
        return [self.tokenizer.bos_token_id]

    def encode(
        self, turns: Sequence[Turn], tiles: Sequence[int], shown: Sequence[Shown] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [T], and the supervised mask, bool [T], of a conversation or of a text.

        Args:
            turns: system (optional), human, gpt, human, gpt, ...; or one ``pretrain`` turn.
            tiles: tiles of each image, thumbnail counted, in the order of the placeholders.
            shown: what each image takes up; empty: ``features_per_tile`` tokens for each tile.

        Raises:
            RejectError: not as many placeholders as images, or an image's token in a text.
        """
        return self._encode(turns, tiles, shown, "")

    def count(
        self, turns: Sequence[Turn], tiles: Sequence[int], shown: Sequence[Shown] = ()
    ) -> int:
        """Return the number of tokens that ``encode`` makes, faster; arguments and errors as
        there.
        """
        if self.format.is_of_pairs or self.format.split_at_images:
            return len(self.encode(turns, tiles, shown)[0])
        turns = self._with_system(turns)
        self._check(turns, len(tiles))
        texts = ["".join(piece) for piece in self._render_all(turns)]
        if self.format.joint:
            texts = ["".join(texts)]
        if texts[0] != self._first_count[0]:
            self._first_count = texts[0], self._words.count(texts[0])
        found = len(self.first_tokens) + self._first_count[1]
        found += sum(map(self._words.count, texts[1:]))
        return found + sum(one.features for one in self._shown(tiles, shown)) - len(tiles)

    def instruction(self, turns: Sequence[Turn], tiles: Sequence[int]) -> np.ndarray:
        """Tokens of what a Q-Former reads beside the images of a conversation, int32 [m]; none
        without images, or if the template has no instructions. Arguments as for ``encode``.
        """
        if self.instructions is None or not len(tiles):
            return NO_INSTRUCTION
        return self.instructions.of(turns)

    def prompt(
        self,
        question: str | Sequence[Turn],
        tiles: Sequence[int] = (),
        shown: Sequence[Shown] = (),
    ) -> np.ndarray:
        """Tokens, int32 [T], up to where the answer begins: the start of what ``encode`` makes of
        the same conversation.

        Args:
            question: the human's text, or the turns up to a human one. One image without a
                placeholder goes first, on its own line.
            tiles, shown: as for ``encode``.

        Raises:
            RejectError: not as many placeholders as images, or an image's token in a text.
        """
        if isinstance(question, str):
            alone = len(tiles) == 1 and IMAGE_PLACEHOLDER not in question
            question = [
                Turn(role="human", text=f"{IMAGE_PLACEHOLDER}\n{question}" if alone else question)
            ]
        return self._encode(question, tiles, shown, self.format.opening)[0]

    def image_extents(self, tokens: np.ndarray, shown: Sequence[Shown]) -> tuple[np.ndarray, ...]:
        """Return where images begin and end in the tokens of a sample, as ``extents`` does."""
        ids = self.context_token_id, self.newline_token_id
        return extents(tokens, self.format.images, shown, *ids)

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode an answer's tokens, leaving out special tokens and what stands before its text."""
        ids = [int(token) for token in tokens]
        if ids[: len(self._start_tokens)] == self._start_tokens:
            ids = ids[len(self._start_tokens) :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(
        self, turns: Sequence[Turn], tiles: Sequence[int], shown: Sequence[Shown], opening: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of turns, followed by the ``opening`` of an answer."""
        if self.format.is_of_pairs:
            return self._encode_pair(turns, tiles)
        turns = self._with_system(turns)
        self._check(turns, len(tiles))
        pieces = self._render_all(turns)
        is_joint = self.format.joint or turns[0].role == "pretrain"
        tokens, supervised = (self._encode_joint if is_joint else self._encode_apart)(
            turns, pieces, opening
        )
        if self.first_tokens:
            start = 0
            if self.format.images_before_text:
                is_text = tokens != self.context_token_id
                start = int(is_text.argmax()) if is_text.any() else len(tokens)
            tokens = np.insert(tokens, start, np.array(self.first_tokens, np.int32))
            supervised = np.insert(supervised, start, np.zeros(len(self.first_tokens), bool))
        if not len(tiles):
            return tokens, supervised
        for token_id in self._image_token_ids:
            supervised[tokens == token_id] = False
        if turns[0].role == "pretrain" and self.format.learns_behind_images:
            supervised = learned_behind_image(tokens, supervised, self.context_token_id)
        # Each placeholder became one context token, and no text holds another.
        ids = self.context_token_id, self.newline_token_id
        return expand(tokens, supervised, self._shown(tiles, shown), *ids)

    def _shown(self, tiles: Sequence[int], shown: Sequence[Shown]) -> Sequence[Shown]:
        """Return what images take up in the text; arguments as for ``encode``."""
        return shown or [Shown(features=count * self.features_per_tile) for count in tiles]

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return the turns of a conversation, with the usual system message if they have none."""
        if turns[0].role in ("system", "pretrain") or not self.system_message:
            return list(turns)
        return [Turn(role="system", text=self.system_message), *turns]

    def _encode_pair(
        self, turns: Sequence[Turn], tiles: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the text of a pair; all are supervised."""
        tokens = pair_tokens(
            self.format,
            pair_text(turns, tiles),
            self.pair_length,
            tokenize=lambda whole: self.tokenizer(whole)["input_ids"],
            end=self.tokenizer.eos_token_id,
            padding=self.tokenizer.pad_token_id,
        )
        return np.array(tokens, np.int32), np.ones(len(tokens), bool)

    def _render_all(self, turns: Sequence[Turn]) -> list[tuple[str, str, str]]:
        """Render the turns of a conversation, of which an answer may end with other tokens if it
        is the last turn.
        """
        *others, last = turns
        end = self.format.final_end
        return [*(self._render(turn, self.format.end) for turn in others), self._render(last, end)]

    def _render(self, turn: Turn, end: str) -> tuple[str, str, str]:
        """Split the text of a turn into what precedes the learned part, that part, and what follows
        it; an answer ends with ``end``.
        """
        text = turn.text.strip() if self.format.strip else turn.text
        if turn.role in SHOWING_ROLES:
            if turn.role == "human" and not self.format.questions:
                text = IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER)
            if turn.role == "human" and self.format.image_first:
                text = with_image_first(text)
            if self.format.gathers_images:
                count = text.count(IMAGE_PLACEHOLDER)
                text = IMAGE_PLACEHOLDER * count + without_images(text)
            if self.format.chunk_end and turn.role == "pretrain":
                text = with_chunk_ends(text, self.format.chunk_end)
            text = self.format.images.shown_in(text)
        if turn.role == "pretrain":
            return "", text + self.format.text_end, ""
        if turn.role == "gpt":
            answer = self.format.start + text + end
            if not turn.learned:
                return self.format.opening + answer, "", self.format.closing
            return self.format.opening, answer, self.format.closing
        row = self.format.system if turn.role == "system" else self.format.human
        return row.replace("{}", text, 1), "", ""

    def _encode_apart(
        self, turns: Sequence[Turn], pieces: list[tuple[str, str, str]], opening: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each turn as a text of its own, as InternVL 2.5 does: a merge over their border would
        make other tokens.
        """
        first, *others = ["".join(piece) for piece in pieces]
        if first != self._first[0]:  # one system message begins most conversations
            self._first = first, self._first_turn(first)
        tokens = [self._first[1], *self._words.encode(others)]
        length = 0
        learned = []
        for turn, found in zip(turns, tokens, strict=True):
            end = length + len(found)
            if turn.role == "gpt" and turn.learned:
                learned.append((length + len(self._opening_tokens), end - self._closing_length))
            length = end
        if opening:
            tokens.append(np.array(self._opening_tokens, np.int32))
            length += len(self._opening_tokens)
        mask = np.zeros(length, bool)
        for start, end in learned:
            mask[start:end] = True
        return np.concatenate(tokens), mask

    def _first_turn(self, text: str) -> np.ndarray:
        """Token ids of the text of the first turn. If the template splits at images, what stands
        behind them is an instruction, which becomes tokens alone and is cut in front.
        """
        if not self.format.split_at_images:
            return self._words.encode([text])[0]
        context = self.format.images.context
        most = max(1, self.instruction_length - len(self.first_tokens))
        found = self._words.encode([text.replace(context, "")])[0]
        images = np.full(text.count(context), self.context_token_id, np.int32)
        return np.concatenate([images, found[-most:]])

    def _encode_joint(
        self, turns: Sequence[Turn], pieces: list[tuple[str, str, str]], opening: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """All turns as one text; a token is learned that reaches into a learned part of it."""
        text = ""
        learned = []
        for before, body, after in pieces:
            text += before
            if body:
                learned.append((len(text), len(text) + len(body)))
            text += body + after
        text += opening
        if not self.format.split_at_images:
            return self._with_mask(text, learned)
        context = self.format.images.context
        image = np.array([self.context_token_id], np.int32), np.zeros(1, bool)
        found = []
        start = 0
        for number, part in enumerate(text.split(context)):
            found += [image] if number else []
            inside = [(first - start, last - start) for first, last in learned]
            found += [self._with_mask(part, inside)] if part else []
            start += len(part) + len(context)
        return (
            np.concatenate([tokens for tokens, _ in found]),
            np.concatenate([mask for _, mask in found]),
        )

    def _with_mask(
        self, text: str, learned: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a text, and whether each reaches into a learned part of it."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), bool)
        for start, end in learned:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return np.array(found["input_ids"], np.int32), mask

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; what the tokenizer's own call gives, without the half of its time
        that is not for these.
        """
        return [
            found.ids
            for found in self.tokenizer.backend_tokenizer.encode_batch_fast(
                texts, add_special_tokens=False
            )
        ]

    def _token_id(self, token: str) -> int:
        """Look up the id of a special token; one that is an ordinary piece has a space before it
        if it begins a text.
        """
        ids = self._tokens([token])[0]
        is_piece = self.format.images.keeps_pieces and len(ids) == 2
        if is_piece and ids[1] == self.tokenizer.get_vocab().get(token):
            return ids[1]
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer has no token {token}, which --template {self.format.name} needs"
            )
        return ids[0]

    def _check(self, turns: Sequence[Turn], images: int) -> None:
        """Refuse a conversation whose texts or turns the template does not take."""
        check_placeholders(turns, images, self._refused)
        if self.format.is_single:
            check_single(turns, self.format.name)
