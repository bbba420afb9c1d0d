"""Which interpreter the quickstart and the try-outs take, with stand-ins for interpreters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# An interpreter: it belongs to an environment if a file beside it says so, has everything after an
# installation, and makes environments.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
    *sys.prefix*) [[ -e "$0.in_environment" ]] ;;
    *find_spec*) [[ -e "$0.has_all" ]] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) touch "$0.has_all" ;;
    *) exit 3 ;;
esac
"""


def interpreter(path: Path, *facts: str) -> Path:
    """Write an interpreter that has the facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER)
    path.chmod(0o755)
    for fact in facts:
        Path(f"{path}.{fact}").touch()
    return path


def found(folder: Path, **variables: str) -> Path:
    """Source the file in a repository's folder; return the interpreter, which has everything."""
    # Programs of the system, but for its Python.
    for name in ("bash", "env", "mkdir", "cp", "touch"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            f'. "{ROOT}/examples/find_python.sh"; command -v $python',
        ],
        cwd=folder,
        env={"PATH": str(folder / "bin"), **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    path = Path(done.stdout.splitlines()[-1])
    assert Path(f"{path}.has_all").exists()
    return path


@pytest.mark.parametrize("named", [False, True])
def test_a_bare_machine_gets_an_environment(tmp_path: Path, named: bool):
    base = interpreter(tmp_path / "bin" / ("python3.12" if named else "python3"))
    variables = {"PYTHON": "python3.12"} if named else {}
    assert found(tmp_path, **variables) == tmp_path / ".venv" / "bin" / "python"
    assert not Path(f"{base}.has_all").exists(), "the system's own interpreter is left alone"


def test_the_environment_of_before_is_used(tmp_path: Path):
    interpreter(tmp_path / "bin" / "python3", "has_all")
    made = interpreter(tmp_path / ".venv" / "bin" / "python", "has_all", "in_environment")
    assert found(tmp_path) == made


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used(tmp_path: Path, variable: str):
    interpreter(tmp_path / ".venv" / "bin" / "python", "has_all", "in_environment")
    active = interpreter(tmp_path / "active" / "bin" / "python", "in_environment")
    assert found(tmp_path, **{variable: str(tmp_path / "active")}) == active


def test_a_named_environment_goes_before_the_active_one(tmp_path: Path):
    interpreter(tmp_path / "active" / "bin" / "python", "has_all", "in_environment")
    named = interpreter(tmp_path / "named" / "bin" / "python", "in_environment")
    active = str(tmp_path / "active")
    assert found(tmp_path, PYTHON=str(named), VIRTUAL_ENV=active) == named


def test_an_image_whose_interpreter_has_all_needs_no_environment(tmp_path: Path):
    image = interpreter(tmp_path / "bin" / "python3", "has_all")
    assert found(tmp_path) == image


def test_an_environment_that_lacks_a_package_gets_it(tmp_path: Path):
    # megavlm itself is always found, in the repository's folder.
    for name in ("megavlm", "megatron/core", "sklearn"):
        (tmp_path / name).mkdir(parents=True)
    active = interpreter(tmp_path / "active" / "bin" / "python", "in_environment")
    asks = f'[[ "$1" == -c ]] && exec env PYTHONPATH= {sys.executable} -S "$@"'
    active.write_text(INTERPRETER.replace("\n", f"\n{asks}\n", 1))
    assert found(tmp_path, VIRTUAL_ENV=str(tmp_path / "active")) == active
