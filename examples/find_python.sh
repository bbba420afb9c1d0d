# Sourced, at the repository's root: $python is an interpreter that has megavlm and what the examples need. It is PYTHON if that belongs to an
# environment, else that of the active virtual or conda environment, of .venv, or the one on the path if it has all; else .venv is made with
# PYTHON (default: python3). What is missing is installed at the versions of constraints.txt.
has_all() {
    "$1" -c "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))" \
        megavlm megatron.core sklearn transformers jsonargparse 2>/dev/null
}
in_environment() { "$1" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.path.isdir(sys.prefix + "/conda-meta"))' 2>/dev/null; }

if [[ -n "${PYTHON:-}" ]] && in_environment "$PYTHON"; then
    python="$PYTHON"
elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" ]]; then
    python="$CONDA_PREFIX/bin/python"
elif [[ ! -x .venv/bin/python ]] && has_all "${PYTHON:-python3}"; then
    python="${PYTHON:-python3}" # an image, whose own interpreter has it
else
    [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
    python="$PWD/.venv/bin/python"
fi
if ! has_all "$python"; then
    echo "installing; this takes a minute or two"
    "$python" -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # each command would compile again what it imports
