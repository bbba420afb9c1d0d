"""Names that older versions used: of parts, of options, of keys in YAML files."""

from __future__ import annotations

from typing import Any

_PARTS = {"projector": "connector"}
# Options of training, which are keys of YAML files too.
OPTIONS = {
    "architecture.pixel_shuffle": "architecture.connector.pixel_shuffle",
    "architecture.projector_norm": "architecture.connector.norm",
}
# Options of tools that are gone, and what to do instead.
GONE = {
    "--pixel_shuffle": (
        "say how many placeholder tokens a tile has with --tokens_per_tile, or take them from"
        " --model"
    )
}


def current_name(pattern: str) -> str:
    """Return a name, or a pattern of names, of weights with the name that its part has today."""
    part, dot, rest = pattern.partition(".")
    return f"{_PARTS.get(part, part)}{dot}{rest}"


def with_current_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings of options with former keys moved to today's."""
    for former, current in OPTIONS.items():
        *path, name = former.split(".")
        section: Any = content
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            value = section[name]
            content = _put(_put(content, former.split("."), None), current.split("."), value)
    return content


def _put(content: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Return a copy with another value at a path, or without the key if the value is none."""
    name, *inside = path
    if inside:
        return content | {name: _put(content.get(name) or {}, inside, value)}
    rest = {key: entry for key, entry in content.items() if key != name}
    return rest if value is None else rest | {name: value}
