"""A place without room is named, if the error does not name it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megavlm.io.full_disk import in_words


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_place_without_room_is_named_once(number: int) -> None:
    bare = OSError(number, "no room")
    assert in_words(bare, "--out", Path("packs")) == f"--out packs: {bare}"
    assert in_words(bare, "--out", None) == str(bare)
    named = OSError(number, "no room", "packs/file")
    assert in_words(named, "--out", Path("packs")) == str(named)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("wrong")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert in_words(error, "--out", Path("packs")) == str(error)
