#!/usr/bin/env bash
# Qwen2.5-VL, small, on two CPU cores, in a few minutes.
#
#   bash examples/qwen2_5_vl/try.sh [OUT]      OUT: folder to make (default: qwen2_5_vl)
#
# It makes boards of digits of three shapes, short videos of three moving digits, one after the other, and a small fresh Qwen2.5-VL, and packs boards and
# videos in their own sizes. It trains stage 2 on boards for a few steps and exports the model, goes on with stage 2 from that folder, then trains stage 3 on
# videos and boards, and stage sft, which leaves the vision encoder frozen and answers held-out questions about both. It exports the model, compares it with the
# trained one, and lets transformers answer the questions with the first and the last export. It ends with OUT/summary.json. Learning rates are higher than the
# recipe's, since the model starts fresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data and a Qwen2.5-VL"
"$python" "$here/make_parts.py" "$out/data"

step "packs"
for stage in 2 3; do
    "$python" tools/pack_dataset.py --recipe qwen2_5_vl --stage "$stage" --model "$out/data/qwen" --jsonl "$out/data/stage$stage.jsonl" \
        --root "$out/data/images" --tokenizer "$out/data/qwen" --system none --capacity 1024 --video_min_pixels 400 --workers 0 \
        --out "$out/packs/stage$stage" >"$out/pack_stage$stage.log" 2>&1 || { cat "$out/pack_stage$stage.log" >&2; exit 1; }
done

# train STAGE NAME PACKS MODEL LOAD STEPS LR OPTION...
train() {
    step "training: stage $1, $2"
    local stage="$1" name="$2" packs="$3" model="$4" load="$5" steps="$6" lr="$7"
    shift 7
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --recipe qwen2_5_vl --stage "$stage" \
        --model "$model" --checkpoint.load "$load" --data.train "$out/packs/$packs" --data.workers 0 --data.group 1 \
        --training.precision float32 --training.steps "$steps" --training.global_batch_size 4 --optimizer.lr "$lr" \
        --optimizer.warmup_steps 0 --optimizer.warmup_ratio 0.05 --checkpoint.save_interval 0 --logging.interval 50 --health.speed_check false \
        --checkpoint.save "$out/runs/$name" --checkpoint.export_hf "$out/exported/$name" "$@"
}
train 2 start stage2 "$out/data/qwen" "$out/data/qwen" 20 1e-3
train 2 stage2 stage2 "$out/exported/start" "$out/exported/start" 250 1e-3
train 3 stage3 stage3 "$out/exported/stage2" "$out/runs/stage2" 250 1e-3
train sft sft stage3 "$out/exported/stage3" "$out/runs/stage3" 40 5e-4 --eval.tasks "$out/data/boards.jsonl,$out/data/films.jsonl" \
    --training.eval_interval 40 --eval.max_new_tokens 6

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/sft" --hf "$out/exported/sft" --data "$out/packs/stage3" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
