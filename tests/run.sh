#!/usr/bin/env bash
# The test command. From a fresh clone: bash tests/run.sh [--quick] [arguments of pytest, such as tests/config -k stage]
#
# --quick leaves out the tests marked slow, most of those with ranks among them: minutes, for work in between.
#
# Without arguments of pytest, two processes share the files of tests; one does on a machine with a GPU, whose memory some tests measure.
#
# It uses the virtual or conda environment that is active; else it makes .venv with python3 (3.11 or newer). PYTHON names another
# interpreter, and goes before both: PYTHON=python3.12 makes .venv-3.12, and the interpreter of an environment uses that environment. There
# it installs what is missing, at the versions of constraints.txt: Python 3.11 gets megatron-core 0.16, newer ones 0.19. Then it checks the
# style and runs the tests. At the end it says what failed, and what was skipped and why.
set -euo pipefail
quick=()
if [[ "${1:-}" == --quick ]]; then
    quick=(-m "not slow")
    shift
fi
[[ "${PYTHON:-}" == */* && "$PYTHON" != /* ]] && PYTHON="$PWD/$PYTHON"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=.venv
if [[ -n "${PYTHON:-}" ]]; then
    in_environment="$("$PYTHON" -c 'import os, sys; print(int(sys.prefix != sys.base_prefix or os.path.isdir(sys.prefix + "/conda-meta")))')"
    if ((in_environment)); then
        python="$PYTHON"
    else
        folder=".venv-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    fi
elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" ]]; then
    python="$CONDA_PREFIX/bin/python"
fi
if [[ -z "${python:-}" ]]; then
    if [[ ! -x "$folder/bin/python" ]]; then
        base="${PYTHON:-python3}"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "tests/run.sh: error: $base is older than Python 3.11; name a newer one: PYTHON=python3.12 bash tests/run.sh" >&2
            exit 2
        }
        "$base" -m venv "$folder"
    fi
    python="$folder/bin/python"
fi

# Modules are compiled when they are first imported, and that is kept: each of the many processes would compile them again.
unset PYTHONDONTWRITEBYTECODE

# Installing again when nothing changed costs a minute, so the files that say what to install are remembered beside the environment.
wanted="$(cat setup.py constraints.txt megavlm/__init__.py <(pwd) | sha256sum | cut -d' ' -f1)"
mark="$("$python" -c 'import sys; print(sys.prefix)')/.megavlm-installed"
if [[ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]]; then
    # To compile what no test imports would cost as much again as the rest of the installation.
    echo "installing into $("$python" -c 'import sys; print(sys.prefix)') ..."
    "$python" -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quickstart]'
    # Without torchvision, which the schedules that the tests compare with do not use.
    "$python" -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt --no-deps timm
    echo "$wanted" >"$mark"
fi

# The tests start their ranks as processes of their own: one thread each, or they fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

# All is run, whatever fails first.
failed=()
"$python" -m ruff check --quiet --output-format concise . || failed+=("ruff check (see above)")
"$python" -m ruff format --check --quiet . >/dev/null || failed+=("ruff format (run: $python -m ruff format .)")
processes=()
if ! nvidia-smi -L >/dev/null 2>&1; then
    # Nothing is compiled for a CPU, and each process that imports megatron-core would load torch's compiler for more than a second.
    export TORCHDYNAMO_DISABLE=1
    if (($# == 0)); then
        # If one crashes, pytest-xdist 3.8 waits for ever for the tests of the process that it starts in its place.
        processes=(-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0)
    fi
fi
"$python" -m pytest -rsfE "${quick[@]}" "${processes[@]}" "$@" || failed+=("pytest")
if ((${#failed[@]})); then
    printf 'tests/run.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
