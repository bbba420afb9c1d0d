"""Annotation files of JSON: one object a line, or one list of objects, as LLaVA's are."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from megavlm.data.records.forms import FORMS, LIST_KEYS
from megavlm.data.records.preferences import BOTH_KEYS
from megavlm.data.records.raw_record import OffsetRange, RawRecord, in_ranges
from megavlm.data.records.record import parse_json
from megavlm.data.records.reject import RejectError, printable
from megavlm.io.remote import is_remote, local_copy

# A record has some kilobytes. Longer than this, it is not a line of an annotation file, and would
# fill the memory of every worker.
MAX_RECORD_BYTES = 2**26
HEAD_BYTES = 2**20
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
# What lies between two elements of a list.
_GAP = re.compile(rb"[,\]]|[^\s,\]]+")
_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
# The beginning of COCO's or VQAv2's object, to the first key that tells of joined lists.
_JOINED = re.compile(
    rb'(?:\xef\xbb\xbf)?\s*+\{(?:\s*+"\w++"\s*+:\s*+'
    rb'(?:"[^"]*+"|\{[^{}]*+\}|\[[^][]*+\]|[\w.+-]++)\s*+,)*?'
    rb'\s*+"(?:images|annotations|questions)"\s*+:\s*+\[\s*+\{[^{}]*'
    rb'"(?:file_name|image_id|question_id|question_type)"\s*+:'
)
_OLD_LINE_END = re.compile(rb"\}[ \t]*\r[ \t\r]*\{")
_LITERAL = rb"true|false|null|-?(?:Infinity|[0-9.eE+-]+)|NaN"
_SCALAR = re.compile(_LITERAL)
# All tokens of a JSON text but strings and brackets.
_SIGN = re.compile(rb"[\s,:]|" + _LITERAL)
_CLOSES = {ord("}"): ord("{"), ord("]"): ord("[")}
MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip < {} > plain.jsonl"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc {} > plain.jsonl"),
    b"BZh": ("bzip2", "bunzip2 < {} > plain.jsonl"),
    b"\xfd7zXZ": ("xz", "xz -dc {} > plain.jsonl"),
    b"PK\x03\x04": ("zip", "unzip {}"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {} > plain.jsonl"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {} > plain.jsonl"),
}


def open_json(path: str) -> JsonLines | JsonList:
    """Open a file of JSON, by its content: a list, or one object a line.

    Raises:
        ValueError: the file is something else; says what, and the command that makes lines of it.
    """
    local = local_copy(path) if is_remote(path) else path
    with open(local, "rb") as file:
        head = file.read(HEAD_BYTES)
    for magic, (kind, command) in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path}: {kind} data; records are read by their offset, which needs plain UTF-8:"
                f" {command.format(path)}"
            )
    if b"\n" not in head and _OLD_LINE_END.search(head):
        raise ValueError(
            f"{path}: lines that end with a carriage return alone: tr '\\r' '\\n' < {path} >"
            " lines.jsonl"
        )
    if _BEGINNING.match(head):
        return JsonList(path, local)
    _refuse_spread_object(path, head)
    return JsonLines(path, local)


def _refuse_spread_object(path: str, head: bytes) -> None:
    """Refuse a file whose first object spans several lines, or holds the list of records."""
    text = head.decode("utf-8-sig", "replace").lstrip()
    line = text.partition("\n")[0]
    try:
        first = json.loads(line)
        spread = False
    except (ValueError, RecursionError):
        first, end = _first_value(text)
        spread = end > len(line)
    # A record may hold lists of its own, such as the texts that its image shows.
    is_record = isinstance(first, dict) and any(
        all(key in first for key in keys) for keys in (*(form.keys for form in FORMS), BOTH_KEYS)
    )
    records = first.items() if isinstance(first, dict) and not is_record else ()
    lists = [key for key, value in records if _is_record_list(value)]
    if not is_record and _JOINED.match(head):
        raise ValueError(
            f"{path}: an object whose lists name each other by ids, as COCO's and VQAv2's do; make"
            ' records of them by the commands of docs/formats.md, "COCO\'s captions and VQAv2"'
        )
    if len(lists) == 1:
        raise ValueError(
            f"{path}: an object with a list of records under {lists[0]!r}; write the records as"
            f" lines: jq -c '.{lists[0]}[]' {path} > lines.jsonl"
        )
    if spread:
        raise ValueError(
            f"{path}: objects that span several lines; write each on one line: jq -c . {path} >"
            " lines.jsonl"
        )


def _first_value(text: str) -> tuple[dict[str, Any], int]:
    """Return the object that a text begins with, and its length; ``{}`` and 0 if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # The head of the file may have cut the object.
        wrapped = re.match(r'\{\s*"(\w+)"\s*:\s*\[\s*\{\s*"(\w+)"', text)
        known = (*LIST_KEYS, "image_info", "prompt", *BOTH_KEYS)
        if wrapped and len(text) > HEAD_BYTES // 8 and wrapped[1] not in known:
            return {wrapped[1]: [{"text": ""}]}, len(text)
        return {}, 0
    return (value, end) if isinstance(value, dict) else ({}, 0)


def _is_record_list(value: Any) -> bool:
    """Tell a list of records from a list of turns."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return bool({"conversations", "messages", "image", "images", "text", "caption"} & set(value[0]))


class JsonLines:
    """One JSON object a line; blank lines are not records, but count as lines.

    Args:
        path: of the file, or its URL.
        local: path of a local copy; empty: the file is local.
    """

    def __init__(self, path: str, local: str = "") -> None:
        self.path = path
        self._local = local or path

    def ranges(self, length: int) -> Iterator[OffsetRange]:
        """See ``Reader``; a record is a line that is not blank."""
        start = 0
        first = 1
        number = 0
        records = 0
        offset = 0
        with open(self._local, "rb", buffering=1 << 20) as file:
            while line := _read_line(file):
                number += 1
                if not line.isspace():
                    if not records:
                        start = offset
                        first = number
                    records += 1
                # A line that was too long is longer in the file than in memory.
                offset = offset + len(line) if len(line) <= MAX_RECORD_BYTES else file.tell()
                if records == length:
                    yield OffsetRange(
                        offset=start, number=first, records=records, size=offset - start
                    )
                    records = 0
            if records:
                yield OffsetRange(offset=start, number=first, records=records, size=offset - start)

    def read(self, offset: int, number: int, count: int) -> Iterator[RawRecord]:
        """See ``Reader``."""
        with open(self._local, "rb") as file:
            file.seek(offset)
            start = offset
            while count:
                line = _read_line(file)
                if not line:
                    return
                long = len(line) > MAX_RECORD_BYTES
                end = file.tell() if long else start + len(line)
                if not line.isspace():
                    content = _too_long() if long else line
                    yield RawRecord(offset=start, number=number, content=content, size=end - start)
                    count -= 1
                start = end
                number += 1


class JsonList:
    """One JSON list of objects. The objects are found by their brackets, so that the list is never
    in memory as a whole.

    Args:
        path: of the file, or its URL.
        local: path of a local copy; empty: the file is local.
    """

    def __init__(self, path: str, local: str = "") -> None:
        self.path = path
        self._local = local or path

    def ranges(self, length: int) -> Iterator[OffsetRange]:
        """See ``Reader``."""
        return in_ranges(self._extents(None, 1), length)

    def read(self, offset: int, number: int, count: int) -> Iterator[RawRecord]:
        """See ``Reader``."""
        with open(self._local, "rb") as file:
            for step, (start, end) in zip(
                range(count), self._extents(offset, number), strict=False
            ):
                file.seek(start)
                location = f"record {number + step} at byte {start}"
                if end - start > MAX_RECORD_BYTES:
                    content: Mapping[str, Any] | RejectError = _too_long()
                else:
                    content = self._parse(file.read(end - start), location)
                yield RawRecord(
                    offset=start,
                    number=number + step,
                    content=content,
                    size=end - start,
                    location=location,
                )

    def _parse(self, data: bytes, location: str) -> Mapping[str, Any] | RejectError:
        """Parse one element. Raises ValueError if it is damaged in a way that may have hidden the
        end of the record: an unescaped quote turns text into structure and structure into text.
        """
        try:
            return parse_json(data)
        except RejectError as error:
            if not _is_one_record(data):
                self._fail(f"{location}: {error.detail}")
            return error

    def _extents(self, start: int | None, number: int) -> Iterator[tuple[int, int]]:
        """Yield where the elements from ``start`` (None: the first) begin and end.

        Raises:
            ValueError: the file is not a list of elements with one comma between them and nothing
                behind it.
        """
        with (
            open(self._local, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if start is None:
                beginning = _BEGINNING.match(data)
                if beginning is None:
                    self._fail("not a JSON list (it does not begin with a bracket)")
                start = beginning.end()
                before = "["
            else:
                before = ","
            for first, end in _elements(data, start):
                if first < 0:
                    before = self._check_gap(data, -first - 1, end, before, number)
                    if before == "end":
                        return
                    continue
                if before not in "[,":
                    self._fail(f"record {number} at byte {first}: no comma before it")
                yield first, end
                before = "value"
                number += 1
            self._fail(f"the list is not closed: record {number} has no end, or a ] is missing")

    def _check_gap(self, data: mmap.mmap, at: int, end: int, before: str, number: int) -> str:
        """Check a comma or the bracket at the end of the list, and return which it was."""
        sign = data[at : at + 1]
        if sign == b"," and before == "value":
            return ","
        if sign == b"]" and before in ("value", "["):
            if re.compile(rb"\S").search(data, end):
                self._fail(f"something follows the end of the list at byte {at}")
            return "end"
        self._fail(
            f"byte {at}, before record {number}: {printable(data[at:end].decode('latin-1'), 40)!r}"
            " is not expected here"
        )
        return ""

    def _fail(self, problem: str) -> None:
        """Raise ValueError: how many records there are is not known."""
        raise ValueError(
            f"{self.path}: {problem}; the records after it cannot be counted, so none are packed:"
            " repair the file, or write one object a line, where damage is one record's"
        )


def _elements(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Yield the extents of the elements of a list, and of the signs between them as ``(-1 - begin,
    end)``. Ends at the end of the data, or when a bracket does not match.
    """
    opened: list[int] = []
    first = start
    gap = start
    for token in _TOKEN.finditer(data, start):
        kind = data[token.start()]
        if not opened:
            yield from _signs(data, gap, token.start())
            gap = token.end()
            if kind in b"}]":
                yield -1 - token.start(), token.end()
            elif kind == ord('"'):
                yield token.start(), token.end()
            else:
                first = token.start()
                opened.append(kind)
        elif kind in b"{[":
            opened.append(kind)
        elif kind in b"}]":
            if opened.pop() != _CLOSES[kind]:
                return
            if not opened:
                yield first, token.end()
                gap = token.end()
    if not opened:
        yield from _signs(data, gap, len(data))


def _signs(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what lies between two bracketed elements: signs, and elements without brackets."""
    for found in _GAP.finditer(data, start, end):
        if found[0] in (b",", b"]"):
            yield -1 - found.start(), found.end()
        elif _SCALAR.fullmatch(found[0]):
            yield found.start(), found.end()
        else:
            yield -1 - found.start(), found.end()


def _is_one_record(data: bytes) -> bool:
    """Return whether damaged JSON is certainly one record: outside of its strings are only signs
    of JSON, and no object stands where a key should.
    """
    before = b""
    end = 0
    opened: list[int] = []
    for token in [*_TOKEN.finditer(data), None]:
        gap = data[end : token.start() if token else len(data)]
        if _SIGN.sub(b"", gap):
            return False
        before = gap.strip()[-1:] or before
        if token is None:
            return True
        kind = data[token.start()]
        if kind in b"{[" and opened and opened[-1] == ord("{") and before != b":":
            return False
        if kind in b"{[":
            opened.append(kind)
        elif kind in b"}]" and opened:
            opened.pop()
        before = data[token.start() : token.start() + 1]
        end = token.end()
    return True


def _read_line(file: BinaryIO) -> bytes:
    """Read the next line; one that is too long is passed over in pieces, and cut off at one byte
    more than the limit.
    """
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
        while (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
            pass
    return line


def _too_long() -> RejectError:
    return RejectError("malformed_json", f"longer than {MAX_RECORD_BYTES} bytes")
