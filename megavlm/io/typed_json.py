"""Objects of JSON as the dataclasses that they were written from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints


def build(kind: Any, value: Any, where: str, *, optional: bool = False) -> Any:
    """Build a ``kind`` from what ``dataclasses.asdict`` and JSON made of one, strictly: no field is
    missing, none is unknown, and each has its type.

    Args:
        kind: a dataclass, or the type of a field: str, int, float, bool; or a list, tuple or dict
            of one of these.
        value: of JSON.
        where: names the value in errors.
        optional: whether fields with a default may be missing.

    Raises:
        ValueError: the value is not of this kind.
    """
    outer = get_origin(kind) or kind
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return kind(**_fields(kind, value, where, optional))
    if isinstance(value, dict) and outer is dict:
        key, inner = get_args(kind)
        return {
            key(name): build(inner, entry, f"{where}: {name}", optional=optional)
            for name, entry in value.items()
        }
    if isinstance(value, list) and outer in (list, tuple):
        inner, *more = get_args(kind)
        if not more or more[0] is ... or len(value) == 1 + len(more):
            return outer(
                build(inner, entry, f"{where}[{index}]", optional=optional)
                for index, entry in enumerate(value)
            )
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{where}: {value!r:.80} is no {outer.__name__}")


def _fields(kind: type, facts: dict[str, Any], where: str, optional: bool) -> dict[str, Any]:
    """Return the values of a dataclass's fields."""
    types, defaults = _known(kind)
    missing = sorted(types.keys() - facts.keys() - (defaults if optional else set()))
    unknown = sorted(facts.keys() - types.keys())
    if missing or unknown:
        raise ValueError(
            f"{where}: facts missing: {missing or 'none'}; facts unknown: {unknown or 'none'}"
        )
    return {
        name: value
        if type(value) is types[name]
        else build(types[name], value, f"{where}: {name}", optional=optional)
        for name, value in facts.items()
    }


@cache
def _known(kind: type) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Return the types of a dataclass's fields, and the names of those with a default."""
    with_default = frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    )
    return MappingProxyType(get_type_hints(kind)), with_default
