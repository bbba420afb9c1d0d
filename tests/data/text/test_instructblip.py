"""InstructBLIP's template, and the second stream of tokens, which its Q-Former reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert.round_trip import golden_words
from tests.data.pair_tokenizer import make_pair_tokenizer

WORDS = ("a", "red", "dog")
BEGIN = 4
END = 5


def template(folder: Path, **settings: int) -> ChatTemplate:
    golden_words(folder / "words", "llava")
    other = load_tokenizer(make_pair_tokenizer(folder / "qformer", WORDS))
    tokenizer = load_tokenizer(folder / "words")
    return ChatTemplate(tokenizer, 3, name="instructblip", qformer_tokenizer=other, **settings)


def asked(question: str, answer: str = "It is blue.") -> list[Turn]:
    return [Turn(role="human", text=question), Turn(role="gpt", text=answer)]


def test_question_and_answer_are_tokens_each_by_itself(tmp_path: Path) -> None:
    made = template(tmp_path)
    words = made.tokenizer
    tokens, supervised = made.encode(asked("<image>\n A red dog? "), [1])
    question = words("A red dog?")["input_ids"]
    answer = words("It is blue.</s>", add_special_tokens=False)["input_ids"]
    assert tokens.tolist() == [made.context_token_id] * 3 + question + answer
    assert supervised.tolist() == [False] * (3 + len(question)) + [True] * len(answer)
    assert question[0] == words.bos_token_id and answer[-1] == words.eos_token_id
    assert made.count(asked("<image>\n A red dog? "), [1]) == len(tokens)


def test_the_q_former_reads_the_question_in_tokens_of_its_own(tmp_path: Path) -> None:
    made = template(tmp_path)
    found = made.instruction(asked("A red <image> dog"), [1])
    assert found.tolist() == [BEGIN, 0, 1, 2, END] and found.dtype == np.int32
    assert made.instruction(asked("<image>"), [1]).tolist() == [BEGIN, END]
    assert not len(made.instruction(asked("A red dog"), []))


def test_long_questions_lose_their_beginning(tmp_path: Path) -> None:
    made = template(tmp_path, instruction_length=6)
    turns = asked("<image>" + "red " * 9 + "dog")
    tokens, supervised = made.encode(turns, [1])
    question = made.tokenizer("red " * 9 + "dog")["input_ids"]
    assert tokens[3:9].tolist() == [question[0], *question[-5:]]
    assert not supervised[:9].any() and supervised[9:].all()
    found = made.instruction(turns, [1]).tolist()
    tokenizer = made.instructions.tokenizer
    tokenizer.truncation_side = "left"
    text = "red " * 9 + "dog"
    assert found == tokenizer(text, truncation=True, max_length=6)["input_ids"]
    assert found == [BEGIN, 1, 1, 1, 2, END]


def test_several_questions_are_refused(tmp_path: Path) -> None:
    turns = asked("<image>A dog?") + asked("Red?")
    with pytest.raises(RejectError, match="2 questions .* instructblip has one"):
        template(tmp_path).encode(turns, [1])


def test_it_needs_a_second_tokenizer_with_room_for_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="puts 2 tokens around a text; use more"):
        template(tmp_path, instruction_length=2)
    with pytest.raises(ValueError, match="name its tokenizer with --qformer_tokenizer"):
        ChatTemplate(load_tokenizer(tmp_path / "words"), 3, name="instructblip")
