"""What tests are told of ranks that end."""

from __future__ import annotations

import ctypes

import pytest

from tests.ranks.pool import Pool


def read_nothing() -> None:
    ctypes.string_at(0)


def answer() -> int:
    return 7


def test_a_crash_tells_where_python_was_and_other_processes_take_over(ranks: Pool) -> None:
    with pytest.raises(AssertionError, match="exit code -11") as error:
        ranks.run(read_nothing, 2)
    told = str(error.value)
    assert told.index("Fatal Python error") < told.index("in read_nothing")
    assert ranks.run(answer, 2) == [7, 7]
