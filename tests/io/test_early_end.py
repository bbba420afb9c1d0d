"""A tool whose output is cut short by the command behind it ends as if all had been read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TOOL = """
import sys
from megavlm.io.early_end import allow_early_end
with allow_early_end():
    sys.stdin.read()  # until nobody reads
    print("x" * {length})
    sys.exit({status})
"""


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("length", [5, 10**6])  # in the buffer until the end, or more than it holds
def test_output_that_nobody_reads_is_no_error(length: int, status: int) -> None:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", TOOL.format(length=length, status=status)]
    with subprocess.Popen(command, env=buffered, **pipes) as tool:
        tool.stdout.close()
        tool.stdin.close()
        assert tool.stderr.read() == b""
    # What is printed comes before the status is known.
    assert tool.returncode == (status if length == 5 else 0)


def test_output_that_is_read_is_whole() -> None:
    command = [sys.executable, "-c", TOOL.format(length=3, status=3)]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "xxx\n", "")


def test_other_errors_are_told() -> None:
    code = TOOL.replace("sys.exit({status})", "raise ConnectionResetError").format(length=0)
    done = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ConnectionResetError\n")
