"""Runs a module of this folder in a process of its own, and returns its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def answer_of(module: str, *flags: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a module and return the JSON that it writes to the file whose number it is given.

    Args:
        module: such as ``tests.te.build``.
        flags: of the interpreter.
        variables: of the environment, beside the ones of this process.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(variables)
    with tempfile.TemporaryFile() as answer:
        number = answer.fileno()
        # Of a process that dies, where it was is told.
        options = ["-W", "ignore", "-X", "faulthandler", *flags]
        process = subprocess.run(
            [sys.executable, *options, "-m", module, str(number)],
            env=environment,
            cwd=ROOT,
            pass_fds=[number],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        answer.seek(0)
        return json.load(answer)
