#!/usr/bin/env bash
# LLaVA's stages, small, on two CPU cores, in a few minutes.
#
#   bash examples/llava/try.sh [OUT]      OUT: folder to make (default: llava)
#   RECIPE=llava_next bash examples/llava/try.sh OUT      LLaVA-NeXT: images as grids of tiles; or llava_onevision: larger grids
#
# It makes boards of digits, a small CLIP that can read them and a fresh language model, and packs the boards as LLaVA does (crop, then pad or anyres, or stretch and anyres_max_9). It
# trains the connector, then connector and language model (LLaVA-NeXT and OneVision: everything), exports each stage, compares the last with transformers, and lets transformers answer
# held-out questions after each. OneVision has a stage 3, with videos of digits that come one after the other. It ends with OUT/summary.json. Learning rates are higher than LLaVA's,
# since the language model starts fresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

RECIPE="${RECIPE:-llava}"
first=crop tiling=pad steps=400
# A pack holds fewer of the larger samples.
[[ "$RECIPE" == llava_next ]] && tiling=anyres steps=1200
videos=()
[[ "$RECIPE" == llava_onevision ]] && first=stretch tiling=anyres_max_9 steps=1200 videos=(--videos 4000 --video_exam 200)

step "data, a CLIP, a language model"
OMP_NUM_THREADS=2 "$python" "$here/make_parts.py" "$out/data" "${videos[@]}"

# pack NAME TEMPLATE TILING
pack() {
    "$python" tools/pack_dataset.py --model "$out/data/clip" --jsonl "$out/data/$1.jsonl" --root "$out/data/images" --tokenizer "$out/data/language" \
        --template "$2" --tiling "$3" --capacity 512 --truncate 256 --workers 0 --out "$out/packs/$1" >"$out/pack_$1.log" 2>&1 || { cat "$out/pack_$1.log" >&2; exit 1; }
}
step "packs"
pack stage1 llava_plain "$first"
pack stage2 llava_chatml "$tiling"
((${#videos[@]})) && pack stage3 llava_chatml "$tiling"

# train STAGE STEPS LR OPTION...
train() {
    step "training: stage $1"
    local stage="$1" steps="$2" lr="$3"
    shift 3
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --recipe "$RECIPE" --stage "$stage" \
        --data.train "$out/packs/stage$stage" --data.workers 0 --data.group 1 --training.precision float32 --training.steps "$steps" \
        --training.global_batch_size 4 --optimizer.lr "$lr" --optimizer.clip_grad 1.0 --checkpoint.save_interval 0 --logging.interval 50 \
        --health.speed_check false --checkpoint.save "$out/runs/stage$stage" --checkpoint.export_hf "$out/exported/stage$stage" "$@"
}
train 1 60 2e-3 --init.vision "$out/data/clip" --init.language "$out/data/language"
train 2 "$steps" 2e-3 --model "$out/exported/stage1" --checkpoint.load "$out/runs/stage1"
last=stage2
if ((${#videos[@]})); then
    last=stage3
    train 3 1200 1e-3 --model "$out/exported/stage2" --checkpoint.load "$out/runs/stage2"
fi

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/$last" --hf "$out/exported/$last" --data "$out/packs/$last" --packs 4 --json "$out/verify.json"

step "held-out questions, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
