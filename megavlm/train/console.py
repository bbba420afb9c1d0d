"""What a run prints: a line for each record, for people in a terminal and for files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from megavlm.train.throughput import MFU, STEP_SECONDS, TFLOPS, TOKENS_PER_SECOND

# Sources whose figures fit into a line on the console.
SHOWN_SOURCES = 6
_BAR = 20
# Figures of a step that a terminal shows as words of their own, in this order.
_RATES = (TOKENS_PER_SECOND, TFLOPS, MFU, STEP_SECONDS)

Values = Mapping[str, float | str]
BySource = Mapping[str, Mapping[str, float]]


class Console(Protocol):
    """Prints what a run tells."""

    def log(self, text: str) -> None:
        """Print a text."""

    def record(self, step: int, steps: int, values: Values, by_source: BySource) -> None:
        """Print a line for a record.

        Args:
            step: updates that are done.
            steps: of the whole run; 0: it trains none.
            values: figures by name.
            by_source: figures of each source by name, of which the first ones are shown.
        """


class Lines:
    """Plain lines, with every figure under its name, for files and programs."""

    def log(self, text: str) -> None:
        """Print a text."""
        with contextlib.suppress(OSError, UnicodeError):  # a full disk below a redirected console
            print(text, flush=True)

    def record(self, step: int, steps: int, values: Values, by_source: BySource) -> None:
        """Print a line for a record; see ``Console``."""
        words = [f"step {step} of {steps}" if steps else f"step {step}"]
        words += [f"{name} {short(value)}" for name, value in values.items()]
        left = time_left(step, steps, values)
        words += [f"left {left}"] if left else []
        words += _of_sources(by_source)
        self.log("  ".join(words))


class Terminal:
    """Lines with colours, a bar and units, for people.

    Args:
        file: the terminal; none: standard output.
        width: of a line; none: the terminal's.
    """

    def __init__(self, file: Any = None, width: int | None = None) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(
            file=file, width=width, force_terminal=file is not None or None, highlight=False
        )

    def log(self, text: str) -> None:
        """Print a text; what begins with WARNING or ERROR has a colour."""
        kind = text.partition(":")[0].lower()
        style = {"warning": "yellow", "error": "bold red"}.get(kind)
        with contextlib.suppress(OSError, UnicodeError):
            self._rich.print(text, style=style, markup=False, soft_wrap=True)

    def record(self, step: int, steps: int, values: Values, by_source: BySource) -> None:
        """Print a line for a record; see ``Console``."""
        from rich.text import Text

        line = Text().append("step ", style="dim")
        if steps:
            done = round(_BAR * min(step / steps, 1.0))
            line.append(f"{step:>{len(str(steps))}}/{steps} ", style="bold")
            line.append("━" * done, style="green")
            line.append("━" * (_BAR - done), style="bright_black")
        else:
            line.append(str(step), style="bold")
        names = [name for name in values if name not in _RATES]
        for name in (*names, *(name for name in _RATES if name in values)):
            shown, unit = _with_unit(name, values[name])
            is_loss = name == "loss" or name.endswith(("_loss", "/accuracy"))
            line.append("  " if unit else f"  {name} ", style="dim")
            line.append(shown, style="bold cyan" if is_loss else "")
            line.append(f" {unit}" if unit else "", style="dim")
        if left := time_left(step, steps, values):
            line.append("  left ", style="dim").append(left, style="bold")
        for words in _of_sources(by_source):
            line.append(f"  {words}", style="dim")
        with contextlib.suppress(OSError, UnicodeError):
            self._rich.print(line, soft_wrap=True)


def open_console() -> Console:
    """Return a console for people if standard output is a terminal and rich is installed, or one
    for files.
    """
    is_read_by_people = sys.stdout is not None and sys.stdout.isatty()
    has_bars = is_read_by_people and "utf" in (sys.stdout.encoding or "").lower()
    return Terminal() if has_bars and find_spec("rich") else Lines()


def time_left(step: int, steps: int, values: Values) -> str:
    """Return how long the rest of the run takes at the pace of the record; empty if unknown."""
    seconds = values.get(STEP_SECONDS)
    is_known = isinstance(seconds, float) and step < steps
    return duration(seconds * (steps - step)) if is_known else ""


def duration(seconds: float) -> str:
    """Write a time in its two largest units, such as ``2 d 3 h``."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def short(value: float | str) -> str:
    """Write a figure in six digits; a count in all of its digits."""
    return str(value) if isinstance(value, (str, int)) else f"{value:.6g}"


def _with_unit(name: str, value: float | str) -> tuple[str, str]:
    """Return how people read a figure, and its unit; no unit: the name stands before it."""
    if isinstance(value, str):
        return value, ""
    if isinstance(value, int):
        return f"{value:,}", ""
    if name == TOKENS_PER_SECOND:
        return f"{value / 1e3:,.1f}k" if value >= 1e4 else f"{value:,.0f}", "tokens/s"
    if name == TFLOPS:
        return f"{value:.3g}", "TFLOP/s"
    if name == MFU:
        return f"{value:.1%}", "MFU"
    if name == STEP_SECONDS:
        return f"{value:.3g}", "s/step"
    return f"{value:.4g}", ""


def _of_sources(by_source: BySource) -> list[str]:
    """Return the first figures of sources in words, if the sources are few."""
    return [
        f"{name} of " + ", ".join(f"{source} {figure:.4g}" for source, figure in figures.items())
        for name, figures in list(by_source.items())[:1]
        if 1 < len(figures) <= SHOWN_SOURCES
    ]
