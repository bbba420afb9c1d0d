#!/usr/bin/env bash
# InternVL's preference stage (MPO), small, on two CPU cores, in a few minutes.
#
#   bash examples/preference/try.sh [OUT]      OUT: folder to make (default: preference)
#
# It makes the quickstart's boards of digits, and preferences about more of them: a question, a right answer and a wrong one. It trains stages 0, 1.5
# and 2 so shortly that the model answers part of the held-out questions wrong, then stage mpo with two data-parallel ranks: its first start computes
# the reference's probabilities. It exports the model and compares it with transformers. It ends with OUT/summary.json: the share of held-out pairs
# whose right answer has the higher reward, and the share of held-out questions that are answered right, before and after. It fails if the model has
# not learned. Learning rates are far above InternVL's, since models and runs are so small.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data: boards, questions, preferences, a tokenizer"
"$python" "$here/../quickstart/make_data.py" "$out/data" --records 8000 --lone 6000
"$python" "$here/make_pairs.py" "$out/data"

# pack NAME OPTION...
pack() {
    local name="$1"
    shift
    "$python" tools/pack_dataset.py --model digits --jsonl "$out/data/$name.jsonl" --root "$out/data/images" --tokenizer "$out/data/tokenizer" \
        --capacity 1024 --max_tiles 6 --workers 0 --out "$out/packs/$name" "$@" >"$out/pack_$name.log" 2>&1 || { cat "$out/pack_$name.log" >&2; exit 1; }
    grep -E "^samples" "$out/pack_$name.log" | sed "s/^samples */$name: /"
}
step "packs"
for name in text_train text_valid align_train align_valid mixed_train mixed_valid; do pack "$name"; done
# Records of MMPR's form have no system message; the model was taught with one.
for name in pairs_train pairs_valid; do pack "$name" --recipe internvl --stage mpo --system "You read boards of digits."; done

train() { "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" "$@"; }
data() { echo "--data.train '$out/packs/$1_train' --data.valid '$out/packs/$1_valid'"; }
step "training: stages 0, 1.5 and 2"
train --stage 0,1.5,2 --checkpoint.save "$out/runs" \
    --for 0 "$(data text) --training.steps 200 --training.global_batch_size 2 --optimizer.lr 3e-3" \
    --for 1.5 "$(data align) --training.steps 300 --training.global_batch_size 2" \
    --for 2 "$(data mixed) --training.steps 100"

step "training: stage mpo"
train --stage mpo --data.train "$out/packs/pairs_train" --data.valid "$out/packs/pairs_valid" --checkpoint.load "$out/runs/stage_2" \
    --training.steps 240 --training.eval_interval 80 --optimizer.lr 1e-3 --eval.tasks "$out/data/exam.jsonl" --eval.max_new_tokens 6 \
    --checkpoint.save "$out/runs/mpo" --checkpoint.export_hf "$out/exported"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/mpo" --hf "$out/exported" --data "$out/packs/mixed_valid" --packs 4 --json "$out/verify.json"

step "what it has learned"
"$python" "$here/measure.py" "$out" --seconds $((SECONDS - started))
