"""A server of files that fails on purpose."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable


class Faulty:
    """A WSGI application that fails now and then.

    Args:
        application: that answers.
    """

    def __init__(self, application: Callable) -> None:
        self.application = application
        self.faults: dict[str, list[str]] = {}  # by the end of a path: what happens to requests
        self.seen: Counter[str] = Counter()

    def __call__(self, environ: dict, start: Callable) -> Iterable[bytes]:
        """Answer a request, or fail at it."""
        path = environ["PATH_INFO"]
        name = next((name for name in self.faults if path.endswith(name)), "")
        fault = ""
        if environ["REQUEST_METHOD"] == "GET" and name and self.faults[name]:
            fault = self.faults[name].pop(0)
            self.seen[fault] += 1
        if fault == "503":
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"]
        if fault == "silence":
            time.sleep(2.5)
        body = b"".join(self.application(environ, start))
        return [body[: len(body) // 2]] if fault == "cut" else [body]
