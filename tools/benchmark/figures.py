"""Writes the figures of a benchmark, with what they depend on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any


def write_figures(path: Path, figures: dict[str, Any], **facts: Any) -> None:
    """Write figures as JSON, with load, processor, Python and other facts of the run."""
    known = {
        "load_average": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    text = json.dumps({**figures, **known, **facts}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
