"""Layouts of the pipeline as text."""

from __future__ import annotations

import pytest

from megavlm.config.layout_text import parse_layout, write_layout


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("v*24,c,t*4|t*9|t*9|t*6,h", (28, 9, 9, 6)),
        ("v*24 , t*4 | t*24", (28, 24)),
        ("v*8|v*16|c,t*28,h", (8, 16, 28)),
        ("v,v*23,c,t*28", (52,)),
        ("v*8|v*16|p,t*28,h", (8, 16, 28)),  # the letter of older versions
    ],
)
def test_a_text_gives_the_layers_of_each_chunk(text: str, counts: tuple[int, ...]) -> None:
    assert parse_layout(text, 24, 28) == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v*24,c,t*4|t*9", "has 13 x t, but the language model has 28 layers"),
        ("v*23|t*28", "has 23 x v, but the vision encoder has 24 layers"),
        ("t*28|v*24", "in the order v, c, t, h"),
        ("v*24,h|t*28", "in the order v, c, t, h"),
        ("v*24|t*28|h", "each chunk must have a layer"),
        ("v*24,c|t*28", "c must stand in one chunk with the first t"),
        ("v*24,|t*28", "'nothing' is none of v, c, t, h"),
        ("v24|t*28", "'v24' is none of"),
    ],
)
def test_a_text_that_is_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("'", "'?")):
        parse_layout(text, 24, 28)


@pytest.mark.parametrize(
    "counts", [(52,), (28, 24), (23, 29), (24, 28), (1, 50, 1), (8, 8, 8, 8, 8, 12)]
)
def test_a_layout_that_is_written_is_read_back(counts: tuple[int, ...]) -> None:
    assert parse_layout(write_layout(counts, 24), 24, 28) == counts


def test_a_layout_is_written_with_connector_and_head() -> None:
    assert write_layout((28, 9, 9, 6), 24) == "v*24,c,t*4|t*9|t*9|t*6,h"
