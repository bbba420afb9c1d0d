#!/usr/bin/env bash
# The test command. From a fresh clone: bash tests/run.sh [arguments of pytest, such as tests/config -k stage]
#
# It makes .venv with ${PYTHON:-python3} (3.11 or newer) unless a virtual or conda environment is active, installs what is missing, at the
# versions of constraints.txt, then checks the style and runs the tests. At the end it says what was skipped, and why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" ]]; then
    python="$CONDA_PREFIX/bin/python"
else
    if [[ ! -x .venv/bin/python ]]; then
        base="${PYTHON:-python3}"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "tests/run.sh: error: $base is older than Python 3.11; name a newer one: PYTHON=python3.12 bash tests/run.sh" >&2
            exit 2
        }
        "$base" -m venv .venv
    fi
    python=.venv/bin/python
fi

# Installing again when nothing changed costs a minute, so the files that say what to install are remembered beside the environment.
wanted="$(cat setup.py constraints.txt megavlm/__init__.py <(pwd) | sha256sum | cut -d' ' -f1)"
mark="$("$python" -c 'import sys; print(sys.prefix)')/.megavlm-installed"
if [[ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]]; then
    echo "installing into $("$python" -c 'import sys; print(sys.prefix)') ..."
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quickstart]'
    echo "$wanted" >"$mark"
fi

# The tests start their ranks as processes of their own: one thread each, or they fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

# All is run, whatever fails first.
failed=()
"$python" -m ruff check --quiet --output-format concise . || failed+=("ruff check (see above)")
"$python" -m ruff format --check --quiet . >/dev/null || failed+=("ruff format (run: $python -m ruff format .)")
"$python" -m pytest -rs "$@" || failed+=("pytest")
if ((${#failed[@]})); then
    printf 'tests/run.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
