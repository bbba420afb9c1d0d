"""YAML files of settings, read strictly: what a file says twice, or leaves without a value, is an
error that names the lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megavlm.config.former_names import OPTIONS, with_current_keys
from megavlm.config.options import nearest, options

_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a YAML file says.

    Args:
        where: names the file in messages, such as ``--config run.yaml``.
        content: nested mappings of known keys.
        lines: number of the line of each key, by dotted path.
    """

    where: str
    content: Mapping[str, Any]
    lines: Mapping[str, int]

    def location(self, message: str) -> str:
        """Return the name of the file, and the line of the option that ``message`` names."""
        named = [key for key in self.lines if f"--{key}:" in message]
        return f"{self.where}, line {self.lines[named[-1]]}" if named else self.where


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A key of a file: its dotted path, its line, and the node of its value."""

    path: str
    line: int
    value: yaml.Node


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted paths and values of nested mappings."""
    if isinstance(settings, dict):
        for key, inside in settings.items():
            yield from flat(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, settings


def read(source: str | Path, where: str) -> Settings:
    """Read a YAML text or file.

    Args:
        source: the text, or the path of a file.
        where: names it in messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, no mapping, an unknown key, a key that is given twice or that has no
            value.
    """
    text = source if isinstance(source, str) else _text(source, where)
    try:
        keys, content = _parsed(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: not YAML: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys and values, such as 'stage: 1', got {content!r}")
    if wrong := [*_unknown(keys), *_given_twice(keys), *_without_value(keys)]:
        raise ValueError(f"{where}: " + "\n  ".join(wrong))
    current = with_current_keys(content)
    return Settings(where=where, content=current, lines={key.path: key.line for key in keys})


def _parsed(text: str) -> tuple[list[_Key], Any]:
    """Return the keys that a YAML text has, and what it says."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        # before merged mappings are put into those that name them
        keys = list(_keys(root)) if isinstance(root, yaml.MappingNode) else []
        return keys, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{where}: is a folder; name a YAML file") from None
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not YAML: {error}") from None


def _keys(node: yaml.MappingNode, path: str = "") -> Iterator[_Key]:
    """Yield every key of nested mappings by its current name, a section before what is in it."""
    for name, value in node.value:
        if name.tag == _MERGE:
            continue
        full = f"{path}{name.value}"
        key = _Key(path=OPTIONS.get(full, full), line=name.start_mark.line + 1, value=value)
        yield key
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{key.path}.")


def _unknown(keys: list[_Key]) -> Iterator[str]:
    """Name keys that are no option and no section, and sections that have a value."""
    known = options()
    parents = {key.rpartition(".")[0] for key in known}
    sections = (parents | {name.rpartition(".")[0] for name in parents}) - {""}
    for key in keys:
        if key.path in sections and isinstance(key.value, yaml.ScalarNode):
            if key.value.tag != _NULL:
                yield (
                    f"line {key.line}: unknown key {key.path} (a section: its options go below it)"
                )
        elif key.path not in known and key.path not in sections:
            hint = nearest(key.path, [*sections, *known])
            yield f"line {key.line}: unknown key {key.path}{hint}"


def _given_twice(keys: list[_Key]) -> Iterator[str]:
    """Name keys and sections that stand at two places; YAML itself would take the last one."""
    lines: dict[str, list[int]] = {}
    for key in keys:
        lines.setdefault(key.path, []).append(key.line)
    for path, found in lines.items():
        if len(found) > 1:
            listed = ", ".join(map(str, found[:-1])) + f" and {found[-1]}"
            yield f"lines {listed}: {path} is given {len(found)} times; give it once"


def _without_value(keys: list[_Key]) -> Iterator[str]:
    """Name keys and sections that are empty."""
    known = options()
    for key in keys:
        if key.path in known and key.value.tag == _NULL:
            yield (
                f"line {key.line}: {key.path} has no value; give one"
                f" ({known[key.path].expects}), or leave the key out"
            )
        elif key.path not in known and (
            key.value.tag == _NULL
            or (isinstance(key.value, yaml.MappingNode) and not key.value.value)
        ):
            yield (
                f"line {key.line}: the section {key.path} is empty; give it options, or leave it"
                " out"
            )
