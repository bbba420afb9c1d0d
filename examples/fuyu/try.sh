#!/usr/bin/env bash
# Fuyu, small, on two CPU cores, in a few minutes.
#
#   bash examples/fuyu/try.sh [OUT]      OUT: folder to make (default: fuyu)
#
# It makes boards of digits of three shapes and a small fresh Fuyu, packs the boards as patches, trains the model for a few steps and exports it,
# goes on from that folder, exports again, compares the second export with the trained model, and lets transformers answer held-out questions with
# both. It ends with OUT/summary.json. The learning rate is higher than the recipe's, since the model starts fresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data and a Fuyu"
"$python" "$here/make_parts.py" "$out/data"

step "packs"
"$python" tools/pack_dataset.py --model "$out/data/fuyu" --jsonl "$out/data/train.jsonl" --root "$out/data/images" \
    --tokenizer "$out/data/fuyu" --template fuyu --tiling patches --image_limit 40x40 --capacity 512 \
    --workers 0 --out "$out/packs" >"$out/pack.log" 2>&1 || { cat "$out/pack.log" >&2; exit 1; }

# train NAME MODEL STEPS LR
train() {
    step "training: $1"
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --recipe fuyu --stage 1 \
        --model "$2" --checkpoint.load "$2" --data.train "$out/packs" --data.workers 0 --data.group 1 \
        --training.precision float32 --training.steps "$3" --training.global_batch_size 4 --optimizer.lr "$4" \
        --checkpoint.save_interval 0 --logging.interval 50 --health.speed_check false --checkpoint.save "$out/runs/$1" \
        --checkpoint.export_hf "$out/exported/$1"
}
train start "$out/data/fuyu" 40 1e-3
train whole "$out/exported/start" 350 1e-3

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/whole" --hf "$out/exported/whole" --data "$out/packs" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
