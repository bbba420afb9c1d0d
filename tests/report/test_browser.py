"""A browser shows the curves of the page about runs where their numbers are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from megavlm.report.chart import colour_of
from tests.report.test_report import START, write_run
from tools.report import main

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for found in map(shutil.which, _BROWSERS) if found), "")
# Tells where the corners of the curves are in the window.
_CORNERS = """<script>
const found = [...document.querySelectorAll("polyline")].map(line => {
  const place = line.getScreenCTM();
  return [...line.points].map(point => {
    const there = point.matrixTransform(place);
    return [there.x, there.y];
  });
});
document.body.append(Object.assign(document.createElement("pre"),
  {id: "corners", textContent: JSON.stringify(found)}));
</script>"""

pytestmark = pytest.mark.skipif(
    not BROWSER, reason=f"no browser is installed: one of {', '.join(_BROWSERS)}"
)


def browse(page: Path, *options: str) -> str:
    """Open a page without a window and without a network; return what the browser prints."""
    words = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--force-device-scale-factor=1", "--window-size=1100,1500"),
        *(f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
    ]
    done = subprocess.run(
        [*words, *options, page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


def is_near(picture: np.ndarray, corner: list[float], colour: str) -> bool:
    """Tell whether a pixel around a corner has about the colour of a curve."""
    x, y = map(round, corner)
    around = picture[y - 2 : y + 3, x - 2 : x + 3].astype(int)
    return bool((abs(around - ImageColor.getrgb(colour)).max(axis=-1) < 60).any())


def test_curves_are_drawn_where_their_numbers_are(tmp_path: Path) -> None:
    resumed = write_run(
        tmp_path / "resumed",
        *(dict(step=0) | START, dict(step=1, loss=4.0), dict(step=2, loss=3.0)),
        dict(step=3, loss=99.0),  # done again after the resume
        *(dict(step=2) | START, dict(step=3, loss=2.0), dict(step=4, loss=1.0)),
    )
    other = write_run(
        tmp_path / "other",
        dict(step=0) | START,
        *(dict(step=1 + number, loss=5.0 - number / 4) for number in range(4)),
    )
    page = tmp_path / "report.html"
    assert main([str(resumed), str(other), "--out", str(page)]) == 0

    browse(page, f"--screenshot={tmp_path / 'page.png'}")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    told = tmp_path / "told.html"
    told.write_text(page.read_text() + _CORNERS)
    (content,) = re.findall(r'<pre id="corners">(.*?)</pre>', browse(told, "--dump-dom"))
    curves = json.loads(unescape(content))
    numbers = json.loads(re.findall(r'id="figures">(.*?)</script>', page.read_text())[0])
    losses = [loss for run in numbers.values() for _, loss in run["loss"]]
    assert losses == [4.0, 3.0, 2.0, 1.0, 5.0, 4.75, 4.5, 4.25]
    heights = [y for curve in curves for _, y in curve]
    slope, start = np.polyfit(losses, heights, 1)
    assert slope < -10 and np.allclose(np.multiply(losses, slope) + start, heights, atol=1)
    assert len(curves) == 2
    for number, curve in enumerate(curves):
        colour = colour_of(number)
        assert len(curve) == 4
        assert all(is_near(picture, corner, colour) for corner in curve)
        beside = [[x, y + 25] for x, y in curve[:-1]]
        assert not any(is_near(picture, corner, colour) for corner in beside)
