"""Records of two answers to one prompt, of which one (``chosen``) is preferred to the other
(``rejected``): InternVL's MMPR (arXiv:2411.10442), and the forms of LLaMA-Factory, TRL and
ms-swift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megavlm.data.records.forms import (
    ROLES,
    Form,
    Statement,
    conversation,
    learned_text,
    question,
    read_statement,
    read_turn,
    unicode_text,
)
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError

BOTH_KEYS = ("chosen", "rejected")
# ms-swift's: the answer that is preferred is the last one of the conversation.
OTHER_KEY = "rejected_response"
ANSWER_KEYS = (*BOTH_KEYS, OTHER_KEY)


def read_preference(fields: Mapping[str, Any], media: int, prompt: str) -> tuple[Statement, Turn]:
    """Return what a record says with its preferred answer, and the answer that is not preferred.
    Earlier answers are a part of the prompt: they are not learned. Arguments as for
    ``read_statement``.

    Raises:
        RejectError: the record has not two answers to one prompt, or they are the same.
    """
    found = tuple(key for key in ANSWER_KEYS if fields.get(key) is not None)
    if found == (OTHER_KEY,):
        statement, rejected = _behind_conversation(fields, media, prompt)
    elif found == BOTH_KEYS:
        read = _whole if _is_whole(fields["chosen"]) else _behind_prompt
        statement, rejected = read(fields, media)
    else:
        raise RejectError(
            "no_preference",
            f"the record has {' and '.join(found) or 'none of ' + ', '.join(ANSWER_KEYS)};"
            f" --preferences takes records with {' and '.join(BOTH_KEYS)}, or with {OTHER_KEY}",
        )
    *others, chosen = statement.turns
    if chosen.role == "pretrain":
        raise RejectError("unsupported", f"{OTHER_KEY} beside a text that is learned as a whole")
    if chosen.role != "gpt":
        raise RejectError("role_order", f"{OTHER_KEY} beside turns that end with {chosen.role}")
    for turn, name in ((chosen, "preferred"), (rejected, "rejected")):
        if not turn.learned:
            raise RejectError(
                "unsupported", f"the {name} answer has loss or weight 0, but both are compared"
            )
    if chosen.text == rejected.text:
        raise RejectError("same_answers", f"both answers are {chosen.text!r:.200}")
    before = [replace(turn, learned=turn.learned and turn.role != "gpt") for turn in others]
    statement.turns = [*before, chosen]
    return statement, rejected


def _behind_conversation(
    fields: Mapping[str, Any], media: int, prompt: str
) -> tuple[Statement, Turn]:
    """Read ms-swift's form: any conversation, and another answer than its last one."""
    others = {key: value for key, value in fields.items() if key not in ANSWER_KEYS}
    statement = read_statement(others, media, prompt)
    statement.keys = (*statement.keys, OTHER_KEY)
    return statement, Turn(role="gpt", text=learned_text(fields[OTHER_KEY], OTHER_KEY))


def _behind_prompt(fields: Mapping[str, Any], media: int) -> tuple[Statement, Turn]:
    """Read a prompt, by the first form whose keys it has, and two answers beside it."""
    for form in PROMPTS:
        if all(fields.get(key) is not None for key in form.keys):
            statement = form.read(fields, media, "")
            break
    else:
        known = ", ".join(form.keys[0] for form in PROMPTS)
        raise RejectError("conversation", f"two answers without a prompt: none of {known} is there")
    statement.keys = (*statement.keys, *BOTH_KEYS)
    answers = [_answer(fields[key], key, statement) for key in BOTH_KEYS]
    statement.turns.append(answers[0])
    return statement, answers[1]


def _whole(fields: Mapping[str, Any], media: int) -> tuple[Statement, Turn]:
    """Read TRL's implicit prompt: two conversations that share all but the last answer. A prompt
    beside them must be theirs.
    """
    prompts = []
    answers = []
    for key in BOTH_KEYS:
        turns = fields[key]
        if not _is_whole(turns) or len(turns) < 2:
            raise RejectError(
                "conversation", f"{key} is {turns!r:.200}, not a conversation as the other is"
            )
        prompts.append(conversation(key)({key: turns[:-1]}, media, ""))
        answers.append(_answer(turns[-1], key, prompts[-1]))
    statement, other = prompts
    if (statement.turns, statement.media) != (other.turns, other.media):
        raise RejectError(
            "conversation", "chosen and rejected differ before their last answers: no common prompt"
        )
    for form in PROMPTS[:3]:
        (key,) = form.keys
        if fields.get(key) is not None:
            beside = form.read(fields, media, "")
            _check_beside(beside, [*statement.turns, answers[0]], key)
            statement.keys = (*statement.keys, key)
            statement.unread |= beside.unread
    statement.keys = (*statement.keys, *BOTH_KEYS)
    statement.unread |= other.unread
    statement.turns.append(answers[0])
    return statement, answers[1]


def _check_beside(beside: Statement, turns: list[Turn], key: str) -> None:
    """Refuse a prompt, or a conversation, that stands beside whole conversations and is no part of
    them.
    """
    said = [(turn.role, turn.text) for turn in turns]
    given = [(turn.role, turn.text) for turn in beside.turns]
    is_known = given in (said, said[:-1]) or (len(given) == 1 and given[0] in said)
    if not is_known:
        raise RejectError("conversation", f"{key} is not the prompt that chosen begins with")


def _is_whole(value: Any) -> bool:
    """Return whether a value is a conversation that does not begin with an answer."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("from", value[0].get("role"))
    return ROLES.get(str(role)) != "gpt"


def _answer(value: Any, name: str, statement: Statement) -> Turn:
    """Read an answer: a text, a turn, or a list of one turn. Keys of it that are not read are noted
    in the statement of its prompt.
    """
    if isinstance(value, str):
        return Turn(role="gpt", text=learned_text(value, name))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    alone = Statement(turns=[], keys=())
    turn = read_turn(value, name, alone)
    if turn.role != "gpt":
        raise RejectError("role_order", f"{name} is what {turn.role} says, not an answer")
    if any(alone.media.values()):
        raise RejectError("placeholder_count", f"{name} holds an image or a video")
    statement.unread |= {f"{name}.{key}" for key in alone.unread}
    return turn


def _prompt(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
    """Read TRL's ``prompt``: a text, or a list of turns."""
    value = fields["prompt"]
    if isinstance(value, list):
        return conversation("prompt")(fields, media, prompt)
    turn = Turn(role="human", text=unicode_text(value, "prompt"))
    return Statement(turns=[turn], keys=("prompt",))


PROMPTS = (
    Form(keys=("conversations",), read=conversation("conversations")),
    Form(keys=("messages",), read=conversation("messages")),
    Form(keys=("prompt",), read=_prompt),
    Form(keys=("question",), read=question("question")),
    Form(keys=("instruction",), read=question("instruction", "input")),
    Form(keys=("query",), read=question("query")),
)
