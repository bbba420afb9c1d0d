#!/usr/bin/env bash
# How every try.sh begins, which sources this with its own arguments: it makes the folder OUT, by default one of the recipe's name, goes to the
# repository's root, and finds or makes an environment. Then there are $here (folder of the try.sh), $out, $python, and step NAME, which says
# what comes next.
set -euo pipefail
started=$SECONDS
here="$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)"
recipe="$(basename "$here")"
mkdir -p "${1:-$recipe}"
out="$(cd "${1:-$recipe}" && pwd)"
if [[ -n "$(ls -A "$out")" ]]; then
    echo "examples/$recipe/try.sh: error: $out holds something already; name another folder, or remove it" >&2
    exit 2
fi
cd "$here/../.."

step() { printf '\n== %s (after %d s)\n' "$1" $((SECONDS - started)); }

step "environment"
source "$here/../find_python.sh"
