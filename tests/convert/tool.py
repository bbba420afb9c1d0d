"""Run ``tools/convert_checkpoint.py`` inside the test's own process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TOOL = str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py")


def run_tool(*arguments: str) -> int:
    """Run the tool, and return its exit status."""
    before = sys.argv
    sys.argv = [TOOL, *arguments]
    try:
        runpy.run_path(TOOL, run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the tool did not exit")
