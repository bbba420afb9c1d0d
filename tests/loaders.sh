#!/usr/bin/env bash
# Load exported folders with older releases of transformers: bash tests/loaders.sh [folder for their installs]
#
# Each release gets a folder of its own, in front of the path; torch is that of the environment. They
# take 900 MB, by default in ${XDG_CACHE_HOME:-~/.cache}/megavlm/loaders, and are made once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MEGAVLM_LOADERS="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/megavlm/loaders}"
python="${PYTHON:-python}"
for version in 4.37.2 4.49.0 4.55.4 4.57.1; do
    if [[ ! -e "$MEGAVLM_LOADERS/$version/.complete" ]]; then
        "$python" -m pip install --quiet --disable-pip-version-check --target "$MEGAVLM_LOADERS/$version" \
            "transformers==$version" sentencepiece protobuf jinja2
        touch "$MEGAVLM_LOADERS/$version/.complete"
    fi
done
exec "$python" -m pytest -rs -s -m loaders tests/convert/hf/test_loaders.py
