"""Dataclasses come back from JSON as they were, and anything else is refused by its place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import pytest

from megavlm.io.typed_json import build


@dataclass(kw_only=True)
class Part:
    size: int
    share: float = 0.5


@dataclass(kw_only=True)
class Whole:
    name: str
    parts: list[Part]
    shape: tuple[int, int] = (1, 2)
    means: tuple[float, ...] = ()
    counts: dict[int, int] = field(default_factory=dict)


WHOLE = Whole(name="x", parts=[Part(size=3)], means=(1.0, 2.5, 3.0), counts={4: 5})
FACTS = json.loads(json.dumps(dataclasses.asdict(WHOLE)))


def test_a_dataclass_comes_back_as_it_was() -> None:
    assert build(Whole, FACTS, "file") == WHOLE
    assert isinstance(build(Whole, FACTS | {"means": [1]}, "file").means[0], int | float)


@pytest.mark.parametrize("missing", ["shape", "means", "counts"])
def test_what_has_a_default_may_be_missing_if_that_is_said(missing: str) -> None:
    facts = {name: value for name, value in FACTS.items() if name != missing}
    with pytest.raises(ValueError, match=rf"^file: facts missing: \['{missing}'\]; .* none$"):
        build(Whole, facts, "file")
    default = build(Whole, facts, "file", optional=True)
    assert default == dataclasses.replace(WHOLE, **{missing: type(vars(WHOLE)[missing])()}) or (
        missing == "shape" and default == WHOLE
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": None}, "file: name: None is no str"),
        ({"name": 5}, "file: name: 5 is no str"),
        ({"more": 1}, r"file: facts missing: none; facts unknown: \['more'\]"),
        ({"parts": [{"size": True}]}, r"file: parts\[0\]: size: True is no int"),
        ({"parts": [{"share": 1.0}]}, r"file: parts\[0\]: facts missing: \['size'\]"),
        ({"shape": [1]}, r"file: shape: \[1\] is no tuple"),
        ({"shape": [1, 2, 3]}, r"file: shape: \[1, 2, 3\] is no tuple"),
        ({"shape": [1, "2"]}, r"file: shape\[1\]: '2' is no int"),
        ({"means": ["1"]}, r"file: means\[0\]: '1' is no float"),
        ({"counts": {"4": 5.5}}, "file: counts: 4: 5.5 is no int"),
        ({"counts": []}, r"file: counts: \[\] is no dict"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_its_place(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        build(Whole, FACTS | change, "file", optional=True)
