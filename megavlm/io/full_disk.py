"""What a tool says if there is no room for what it writes."""

from __future__ import annotations

import errno
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def in_words(error: Exception, flag: str, out: Path | None) -> str:
    """Return an error in words, with the place that has no room, which a failed write leaves out.

    Args:
        error: that ended the tool.
        flag: names the place.
        out: the place; none: nothing is written.
    """
    is_full = isinstance(error, OSError) and error.errno in _FULL and not error.filename
    return f"{flag} {out}: {error}" if is_full and out else str(error)
