#!/usr/bin/env bash
# Qwen2.5-VL, small, on two CPU cores, in a few minutes.
#
#   bash examples/qwen2_5_vl/try.sh [OUT]      OUT: folder to make (default: qwen2_5_vl)
#
# It makes boards of digits of three shapes and a small fresh Qwen2.5-VL, packs the boards as images of their own size, trains stage 2 for a few steps
# and exports the model, goes on with stage 2 from that folder, then trains stage sft, which leaves the vision encoder frozen and answers held-out
# questions. It exports the model, compares it with the trained one, and lets transformers answer the questions with the first and the last export.
# It ends with OUT/summary.json. Learning rates are higher than the recipe's, since the model starts fresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data and a Qwen2.5-VL"
"$python" "$here/make_parts.py" "$out/data"

step "packs"
"$python" tools/pack_dataset.py --recipe qwen2_5_vl --stage 2 --model "$out/data/qwen" --jsonl "$out/data/train.jsonl" --root "$out/data/images" \
    --tokenizer "$out/data/qwen" --system none --capacity 1024 --workers 0 --out "$out/packs" >"$out/pack.log" 2>&1 || { cat "$out/pack.log" >&2; exit 1; }

# train STAGE NAME MODEL LOAD STEPS LR OPTION...
train() {
    step "training: stage $1, $2"
    local stage="$1" name="$2" model="$3" load="$4" steps="$5" lr="$6"
    shift 6
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --recipe qwen2_5_vl --stage "$stage" \
        --model "$model" --checkpoint.load "$load" --data.train "$out/packs" --data.workers 0 --data.group 1 \
        --training.precision float32 --training.steps "$steps" --training.global_batch_size 4 --optimizer.lr "$lr" \
        --optimizer.warmup_steps 0 --optimizer.warmup_ratio 0.05 --checkpoint.save_interval 0 --logging.interval 50 --health.speed_check false \
        --checkpoint.save "$out/runs/$name" --checkpoint.export_hf "$out/exported/$name" "$@"
}
train 2 start "$out/data/qwen" "$out/data/qwen" 20 1e-3
train 2 stage2 "$out/exported/start" "$out/exported/start" 250 1e-3
train sft sft "$out/exported/stage2" "$out/runs/stage2" 40 5e-4 --eval.tasks "$out/data/questions.jsonl" --training.eval_interval 40 --eval.max_new_tokens 4

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/sft" --hf "$out/exported/sft" --data "$out/packs" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
