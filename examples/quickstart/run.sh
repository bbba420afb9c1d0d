#!/usr/bin/env bash
# The quickstart: from handwritten digits to a model that answers questions about boards of them, on two CPU cores, in about ten minutes.
#
#   bash examples/quickstart/run.sh [OUT]      OUT: folder to make (default: quickstart)
#
# It makes data, packs them, trains stages 0, 1, 1.5 and 2 under torchrun with two ranks, exports the model to Hugging Face, lets transformers
# answer held-out questions, and ends with a table, OUT/summary.json, OUT/report.html (the curves of all stages) and OUT/evaluated/index.html (the
# answers). It uses the active virtual environment, or makes .venv.
set -euo pipefail
started=$SECONDS
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
mkdir -p "${1:-quickstart}"
out="$(cd "${1:-quickstart}" && pwd)"
if [[ -n "$(ls -A "$out")" ]]; then
    echo "examples/quickstart/run.sh: error: $out holds something already; name another folder, or remove it" >&2
    exit 2
fi
cd "$root"

step() { printf '\n== %s (after %d s)\n' "$1" $((SECONDS - started)); }

step "environment"
source "$here/../find_python.sh"

step "data: boards, questions, a tokenizer"
"$python" "$here/make_data.py" "$out/data"

step "packs"
for name in text_train text_valid align_train align_valid mixed_train mixed_valid; do
    "$python" tools/pack_dataset.py --model digits --jsonl "$out/data/$name.jsonl" --root "$out/data/images" --tokenizer "$out/data/tokenizer" \
        --capacity 1024 --max_tiles 6 --workers 0 --out "$out/packs/$name" >"$out/pack_$name.log" 2>&1 || { cat "$out/pack_$name.log" >&2; exit 1; }
    grep -E "^(packs|tiles)" "$out/pack_$name.log" | sed "s/^/$name: /"
done

# train NAME DATA [PREVIOUS]
train() {
    step "training: $1"
    local options=(--config "$here/$1.yaml" --data.train "$out/packs/$2_train" --data.valid "$out/packs/$2_valid")
    if [[ -n "${3:-}" ]]; then
        options+=(--checkpoint.load "$out/runs/$3" --checkpoint.export_hf "$out/exported/$1" --eval.tasks "$out/data/exam.jsonl" --eval.max_new_tokens 6)
    fi
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py "${options[@]}" --checkpoint.save "$out/runs/$1"
}
train stage0 text
train stage1 align stage0
train stage1_5 align stage1
train stage2 mixed stage1_5

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/stage2" --hf "$out/exported/stage2" --data "$out/packs/mixed_valid" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" tools/evaluate.py 1="$out/exported/stage1" 1.5="$out/exported/stage1_5" 2="$out/exported/stage2" --transformers \
    --tasks "$out/data/exam.jsonl" --packs "$out/packs/mixed_train" --max_new_tokens 6 --out "$out/evaluated" 2>"$out/evaluated.log" \
    || { cat "$out/evaluated.log" >&2; exit 1; }

step "report"
"$python" tools/report.py "$out"/runs/stage{0,1,1_5,2} --out "$out/report.html"
"$python" "$here/summary.py" "$out" --seconds $((SECONDS - started))
echo "$out/summary.json, $out/report.html (curves) and $out/evaluated/index.html (answers) are written; the model is in $out/exported/stage2"
