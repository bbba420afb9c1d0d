"""The forms that people write conversations and texts in, as a table: each row says which keys it
needs and makes turns of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megavlm.data.records.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from megavlm.data.records.reject import RejectError

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "model": "gpt",
    "chatgpt": "gpt",
    "pretrain": "pretrain",
}
TURN_KEYS = ("from", "value", "role", "content", "loss", "weight")
PLAIN_TURN_KEYS = frozenset(TURN_KEYS[:4])
# Content of a turn that has no place in a template.
REFUSED_TURN_KEYS = ("tool_calls", "function_call", "reasoning_content", "image", "images", "audio")


@dataclass(kw_only=True)
class Statement:
    """What a form makes of a record.

    Args:
        turns: of the record.
        keys: that were read.
        media: in the order of the placeholders, what a part of a turn holds itself; None for a
            placeholder that takes the next one of the record's list.
        unread: keys of turns that were not read.
    """

    turns: list[Turn]
    keys: tuple[str, ...]
    media: dict[str, list[Any]] = field(default_factory=lambda: {"image": [], "video": []})
    unread: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A row of the table.

    Args:
        keys: that a record of this form has.
        read: makes turns of the fields; takes the number of the record's images and videos.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], int, str], Statement]


def read_statement(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
    """Return what a record says, by the first form whose keys it has.

    Args:
        fields: of the record.
        media: how many images and videos it lists.
        prompt: what the human turn of a caption says behind the image.

    Raises:
        RejectError: it has no form, or the form's fields are not what they should be.
    """
    for form in FORMS:
        if all(fields.get(key) is not None for key in form.keys):
            return form.read(fields, media, prompt)
    keys = ", ".join(sorted(map(str, fields))) or "none"
    raise RejectError(
        "conversation",
        f"none of {_KNOWN_KEYS} is there; the keys are {keys}",
    )


def conversation(key: str) -> Callable[[Mapping[str, Any], int, str], Statement]:
    """Return the reader of a list of turns under ``key``: InternVL's and ShareGPT's ``from`` and
    ``value``, or OpenAI's ``role`` and ``content``.
    """

    def read(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
        entries = fields[key]
        if not isinstance(entries, list) or not entries:
            raise RejectError("conversation", f"{key} is {entries!r:.200}")
        statement = Statement(turns=[], keys=(key,))
        for index, entry in enumerate(entries):
            statement.turns.append(read_turn(entry, f"{key}[{index}]", statement))
        statement.unread = {f"{key}[].{name}" for name in statement.unread}
        return statement

    return read


def read_turn(entry: Any, name: str, statement: Statement) -> Turn:
    """Read one turn of a conversation."""
    if not isinstance(entry, dict):
        raise RejectError("conversation", f"{name} is {entry!r:.200}, not an object")
    is_plain = entry.keys() <= PLAIN_TURN_KEYS
    for key in () if is_plain else REFUSED_TURN_KEYS:
        if entry.get(key):
            raise RejectError("unsupported", f"{name} has {key}, which is not supported")
    role = entry.get("from", entry.get("role"))
    content = entry.get("value", entry.get("content"))
    if not isinstance(role, str) or not isinstance(content, (str, list)):
        raise RejectError(
            "conversation", f"{name} is {entry!r:.200}, not {{from: text, value: text}}"
        )
    for key in () if is_plain else entry.keys() - TURN_KEYS:
        if entry[key] is not None:
            statement.unread.add(str(key))
    if isinstance(content, list):
        content = _joined_parts(content, name, statement)
    role = ROLES.get(role, role)
    learned = is_plain or _is_learned(entry, name, role)
    if role in ("gpt", "pretrain") and learned:
        text = learned_text(content, name)
    else:
        text = unicode_text(content, name)
    return Turn(role=role, text=text, learned=learned)


def _is_learned(entry: Mapping[str, Any], name: str, role: str) -> bool:
    """Read the ``loss`` or ``weight`` of a turn: an answer has a loss or not."""
    learned = True
    for key in ("loss", "weight"):
        value = entry.get(key)
        if value is None:
            continue
        if value not in (0, 1) or (value == 1 and role not in ("gpt", "pretrain")):
            raise RejectError(
                "unsupported",
                f"{name} has {key} {value!r:.50}; an answer may have 0 or 1 (false or true), other"
                " turns only 0",
            )
        learned = learned and bool(value)
    return learned


def _joined_parts(parts: list[Any], name: str, statement: Statement) -> str:
    """Join the parts of OpenAI's ``content``: texts, and images and videos as placeholders."""
    text = ""
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if any(sign in part["text"] for sign in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)):
                raise RejectError(
                    "placeholder_count",
                    f"{name}: part {index} is a text with a placeholder; images are parts here",
                )
            text += part["text"]
        elif kind in ("image", "image_url", "video", "video_url"):
            medium = kind.removesuffix("_url")
            value = part.get(kind, part.get(medium))
            if isinstance(value, dict) and "url" in value:
                value = value["url"]
            statement.media[medium].append(value)
            text += IMAGE_PLACEHOLDER if medium == "image" else VIDEO_PLACEHOLDER
        else:
            raise RejectError(
                "unsupported", f"{name}: part {index} is {part!r:.100}; text and images are read"
            )
    return text


def question(key: str, more: str = "") -> Callable[[Mapping[str, Any], int, str], Statement]:
    """Return the reader of one question, after a ``history`` of pairs of question and answer."""

    def read(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
        keys = [key, "history"]
        history = fields.get("history") or []
        if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in history
        ):
            raise RejectError("conversation", f"history is {history!r:.200}, not a list of pairs")
        asked = unicode_text(fields[key], key)
        if more:
            keys.append(more)
            if fields.get(more):
                asked = f"{asked}\n{unicode_text(fields[more], more)}"
        pairs = [
            (unicode_text(one, f"history[{index}]"), learned_text(other, f"history[{index}]"))
            for index, (one, other) in enumerate(history)
        ]
        turns = [*_alternate(pairs), Turn(role="human", text=asked)]
        return Statement(turns=turns, keys=tuple(keys))

    return read


def _answered(
    key: str, answer: str, more: str = ""
) -> Callable[[Mapping[str, Any], int, str], Statement]:
    """Return the reader of one question and its answer, after a ``history``."""
    ask = question(key, more)

    def read(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
        statement = ask(fields, media, prompt)
        statement.turns.append(Turn(role="gpt", text=learned_text(fields[answer], answer)))
        statement.keys = (*statement.keys, answer)
        return statement

    return read


def _alternate(pairs: Sequence[tuple[str, str]]) -> Iterator[Turn]:
    for question, answer in pairs:
        yield Turn(role="human", text=question)
        yield Turn(role="gpt", text=answer)


def _texts(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
    """Read ``texts``: the_cauldron's list of questions and answers, or OBELICS' paragraphs, which
    are None where ``images`` has an image.
    """
    texts = fields["texts"]
    if not isinstance(texts, list) or not texts:
        raise RejectError("conversation", f"texts is {texts!r:.200}")
    if not all(isinstance(each, dict) for each in texts):
        return _paragraphs(texts, fields)
    pairs = []
    for index, each in enumerate(texts):
        asked = unicode_text(each.get("user"), f"texts[{index}].user")
        pairs.append((asked, learned_text(each.get("assistant"), f"texts[{index}].assistant")))
    if not any(IMAGE_PLACEHOLDER in question for question, _ in pairs):
        places = "".join(f"{IMAGE_PLACEHOLDER}\n" for _ in range(media))
        pairs[0] = (places + pairs[0][0], pairs[0][1])
    unread = {f"texts[].{key}" for each in texts for key in each.keys() - {"user", "assistant"}}
    return Statement(turns=list(_alternate(pairs)), keys=("texts",), unread=unread)


def _paragraphs(texts: list[Any], fields: Mapping[str, Any]) -> Statement:
    """Read an OBELICS document (arXiv:2306.16527): ``texts`` and ``images`` side by side, with None
    in one of them at each index.
    """
    images = fields.get("images")
    if not isinstance(images, list) or len(images) != len(texts):
        raise RejectError(
            "conversation", f"texts has {len(texts)} entries; images must be a list of as many"
        )
    pieces = []
    found = []
    for index, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise RejectError(
                "conversation", f"texts[{index}] and images[{index}]: one must be null"
            )
        if image is None:
            pieces.append(unicode_text(text, f"texts[{index}]"))
        else:
            pieces.append(IMAGE_PLACEHOLDER)
            found.append(image)
    return _document("\n".join(pieces), found, ("texts", "images"), "texts")


def _sentences(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
    """Read an MMC4 document (arXiv:2304.06939): each image goes in front of the sentence that it
    was matched with, as OpenFlamingo puts it.
    """
    sentences = fields["text_list"]
    images = fields["image_info"]
    if not isinstance(sentences, list) or not isinstance(images, list):
        raise RejectError("conversation", "text_list and image_info must be lists")
    before: dict[int, list[Any]] = {}
    for index, image in enumerate(images):
        match = image.get("matched_text_index") if isinstance(image, dict) else None
        if type(match) is not int or not 0 <= match < len(sentences):
            raise RejectError(
                "conversation",
                f"image_info[{index}]: matched_text_index {match!r:.50} is not one of"
                f" {len(sentences)} sentences",
            )
        encoded = image.get("image_base64")
        content = f"data:image/jpeg;base64,{encoded}" if encoded else image.get("image_name")
        before.setdefault(match, []).append(content)
    pieces = [
        IMAGE_PLACEHOLDER * len(before.get(index, []))
        + unicode_text(sentence, f"text_list[{index}]")
        for index, sentence in enumerate(sentences)
    ]
    found = [image for index in sorted(before) for image in before[index]]
    keys = ("text_list", "image_info", "similarity_matrix")
    return _document(" ".join(pieces), found, keys, "text_list")


def _document(text: str, images: list[Any], keys: tuple[str, ...], name: str) -> Statement:
    """Return an interleaved document as one pretraining text."""
    if text.count(IMAGE_PLACEHOLDER) != len(images):
        raise RejectError("placeholder_count", f"{name} holds the text {IMAGE_PLACEHOLDER}")
    turn = Turn(role="pretrain", text=learned_text(text, name))
    return Statement(turns=[turn], keys=keys, media={"image": images, "video": []})


def _caption(key: str) -> Callable[[Mapping[str, Any], int, str], Statement]:
    """Return the reader of what is to be said about the record's images and videos."""

    def read(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
        text = learned_text(fields[key], key)
        if not media:
            raise RejectError("missing_media", f"{key} without an image or a video")
        # The placeholders of one image or video, or of several images, are put in front later.
        turns = [Turn(role="human", text=prompt), Turn(role="gpt", text=text)]
        return Statement(turns=turns, keys=(key, "caption"))

    return read


def _text(fields: Mapping[str, Any], media: int, prompt: str) -> Statement:
    """Read a text that is learned as a whole; that of an imagefolder's row needs the image."""
    if "file_name" in fields and not media:
        raise RejectError("missing_media", "file_name is null: text without an image or a video")
    turn = Turn(role="pretrain", text=learned_text(fields["text"], "text"))
    return Statement(turns=[turn], keys=("text",))


FORMS = (
    Form(keys=("conversations",), read=conversation("conversations")),
    Form(keys=("messages",), read=conversation("messages")),
    Form(keys=("texts",), read=_texts),
    Form(keys=("text_list", "image_info"), read=_sentences),
    Form(keys=("query", "response"), read=_answered("query", "response")),
    Form(keys=("instruction", "output"), read=_answered("instruction", "output", "input")),
    Form(keys=("question", "answer"), read=_answered("question", "answer")),
    Form(keys=("caption",), read=_caption("caption")),
    # Hugging Face's imagefolder: `text` describes the image.
    Form(keys=("file_name", "text"), read=_caption("text")),
    Form(keys=("text",), read=_text),
)
_KNOWN_KEYS = ", ".join(" with ".join(form.keys) for form in FORMS)
# Keys that hold lists of turns or texts; tables store them as JSON now and then.
LIST_KEYS = ("conversations", "messages", "texts", "history", "images", "videos")


def learned_text(value: Any, name: str) -> str:
    """Return a text that is to be learned, and so is not empty."""
    if not isinstance(value, str):
        raise RejectError("conversation", f"{name} is {value!r:.200}, not a text")
    if not value.strip():
        raise RejectError("empty_answer", f"{name} is empty, and it is what is to be learned")
    return unicode_text(value, name)


def unicode_text(text: Any, name: str) -> str:
    """Return a text that can be written as UTF-8; JSON can escape halves of characters."""
    if not isinstance(text, str):
        raise RejectError("conversation", f"{name} is {text!r:.200}, not a text")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        raise RejectError(
            "conversation", f"{name} holds half of a surrogate pair, which is no text"
        ) from None
    return text
