"""Model cards of exported folders, as a reader uses them."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest
from PIL import Image


def counted_parts(folder: Path) -> dict[str, int]:
    """Return the parameters of each part, as a folder's model card counts them."""
    lines = (folder / "README.md").read_text().splitlines()
    table = lines[lines.index("| part | architecture | parameters | dtype |") + 2 :]
    cells = [line.strip("| ").split(" | ") for line in takewhile(bool, table)]
    return {part: int(count.replace(",", "")) for part, _, count, _ in cells}


def run_example(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """Run the Python example of a folder's model card there, and return what it prints."""
    text = (folder / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.new("RGB", (60, 40), "red").save(folder / "picture.jpg")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, str(folder / "README.md"), "exec"), {})
    return capsys.readouterr().out
