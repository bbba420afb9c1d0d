#!/usr/bin/env bash
# PaliGemma's stages, small, on two CPU cores, in a few minutes.
#
#   bash examples/paligemma/try.sh [OUT]      OUT: folder to make (default: paligemma)
#   GEMMA=2 bash examples/paligemma/try.sh    PaliGemma 2, with a Gemma 2
#
# It makes boards of digits, a small SigLIP that can read them and a fresh Gemma, packs the boards at two resolutions, trains all parts at the lower
# one and then at the higher one, exports both stages, compares the second with transformers, and lets transformers answer held-out questions
# after each. It ends with OUT/summary.json. Learning rates are higher than PaliGemma's, since the language model starts fresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data, a SigLIP, a Gemma"
OMP_NUM_THREADS=2 "$python" "$here/make_parts.py" "$out/data" --gemma "${GEMMA:-1}"

# pack STAGE PIXELS
pack() {
    "$python" tools/pack_dataset.py --model "$out/data/siglip" --jsonl "$out/data/train.jsonl" --root "$out/data/images" \
        --tokenizer "$out/data/gemma" --template paligemma --tiling stretch --image_size "$2" --capacity 512 \
        --workers 0 --out "$out/packs/stage$1" >"$out/pack_stage$1.log" 2>&1 || { cat "$out/pack_stage$1.log" >&2; exit 1; }
}
step "packs"
pack 1 32
pack 2 40

# train STAGE PIXELS STEPS LR OPTION...
train() {
    step "training: stage $1"
    local stage="$1" pixels="$2" steps="$3" lr="$4"
    shift 4
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --recipe paligemma --stage "$stage" \
        --architecture.vision.image_size "$pixels" --data.train "$out/packs/stage$stage" --data.workers 0 --data.group 1 \
        --training.precision float32 --training.steps "$steps" --training.global_batch_size 4 --optimizer.lr "$lr" \
        --checkpoint.save_interval 0 --logging.interval 50 --health.speed_check false --checkpoint.save "$out/runs/stage$stage" \
        --checkpoint.export_hf "$out/exported/stage$stage" "$@"
}
train 1 32 40 1e-3 --init.vision "$out/data/siglip" --init.language "$out/data/gemma"
train 2 40 600 1e-3 --model "$out/exported/stage1" --checkpoint.load "$out/runs/stage1"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/stage2" --hf "$out/exported/stage2" --data "$out/packs/stage2" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
