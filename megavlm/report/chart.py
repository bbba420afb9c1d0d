"""Curves of one figure as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megavlm.report.run_log import Points

_COLOURS = ("#1f5fa8", "#c8501e", "#2e8b57", "#8a4fb0", "#b08a00", "#b3335f", "#4a7f88", "#555555")
_WIDTH = 460
_HEIGHT = 240
_LEFT = 62
_BOTTOM = 28
_TOP = 10
_RIGHT = 12
# Losses that fall by more than this are drawn on a logarithmic axis.
_STEEP = 30.0


def chart(title: str, curves: Sequence[Points]) -> str:
    """Draw a figure of several runs over the steps.

    Args:
        title: name of the figure.
        curves: of every run that the page is about, so that colours stay the same; no points if a
            run has not recorded the figure.
    """
    values = [value for points in curves for _, value in points]
    steps = [step for points in curves for step, _ in points]
    is_log = "loss" in title and min(values) > 0 and max(values) / min(values) > _STEEP
    across = _Axis(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT, is_log=False)
    up = _Axis(min(values), max(values), _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_tick_up(up.at(value), value) for value in up.ticks()),
        *(_tick_across(across.at(step), step) for step in across.ticks()),
    ]
    for number, points in enumerate(curves):
        if points:
            colour = colour_of(number)
            corners = " ".join(
                f"{across.at(step):.1f},{up.at(value):.1f}" for step, value in points
            )
            dots = points if len(points) <= 60 else points[-1:]
            parts.append(f'<polyline points="{corners}" stroke="{colour}"/>')
            parts += [
                f'<circle cx="{across.at(step):.1f}" cy="{up.at(value):.1f}" r="2.5"'
                f' fill="{colour}"><title>step {step}: {value:.6g}</title></circle>'
                for step, value in dots
            ]
    return "".join([*parts, "</svg>"])


def colour_of(run: int) -> str:
    """Return the colour of a run, by its number."""
    return _COLOURS[run % len(_COLOURS)]


def _tick_up(y: float, value: float) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    )


def _tick_across(x: float, step: float) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{step:,.0f}</text>'


class _Axis:
    """Values between two pixels.

    Args:
        least, most: values at the ends.
        start, end: pixels of the ends.
        is_log: whether equal ratios have equal lengths.
    """

    def __init__(self, least: float, most: float, start: float, end: float, *, is_log: bool):
        if least == most:
            least -= abs(least) / 2 or 0.5
            most += abs(most) / 2 or 0.5
        self._scale = math.log10 if is_log else float
        self._least = self._scale(least)
        self._most = self._scale(most)
        self._start = start
        self._end = end
        self._is_log = is_log

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (self._scale(value) - self._least) / (self._most - self._least)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return round values between the ends."""
        if self._is_log:
            powers = range(math.ceil(self._least), math.floor(self._most) + 1)
            found = [10.0**power for power in powers]
            return found if len(found) > 1 else [10**self._least, 10**self._most]
        rough = (self._most - self._least) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self._least / step)
        return [index * step for index in range(first, math.floor(self._most / step) + 1)]
