"""A test that crashes its process ends the test command, which names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.sh"
CRASH = "import os\ndef test_crash(): os.kill(os.getpid(), 11)\ndef test_after(): pass\n"


def test_a_test_that_crashes_its_process_is_named(tmp_path: Path) -> None:
    _, _, rest = RUN.read_text().partition("processes=(-n")
    options, _, _ = rest.partition(")")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name in ("a", "b", "d", "e"):
        (tmp_path / f"test_{name}.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "test_c.py").write_text(CRASH)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "crashed while running 'test_c.py::test_crash'" in done.stdout
