"""Output that is piped into a command which does not read all of it, such as ``head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def allow_early_end() -> Iterator[None]:
    """Take it as no error that the reader of standard output stops early. What is printed after
    that is lost, so files should be written first; an exit status that was on its way is kept.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as broken:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(broken.__context__, SystemExit):
            raise broken.__context__ from None
