"""Run ``tools/convert_checkpoint.py``, or another tool, inside the test's own process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(*arguments: str, tool: str = "convert_checkpoint") -> int:
    """Run the tool, and return its exit status."""
    before = sys.argv
    path = str(_TOOLS / f"{tool}.py")
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the tool did not exit")
