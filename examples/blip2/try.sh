#!/usr/bin/env bash
# BLIP-2's two stages, small, on two CPU cores, in a few minutes.
#
#   bash examples/blip2/try.sh [OUT]      OUT: folder to make (default: blip2)
#
# It makes images of coloured shapes with captions, a small ViT that can see them and a small OPT that can write captions, packs the images as
# BLIP-2 does, trains the Q-Former behind the frozen ViT (stage 1), then before the frozen OPT too (stage 2), exports both, compares them with
# transformers, and lets transformers find and write captions of held-out images. It ends with OUT/summary.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data, a ViT, a language model"
"$python" "$here/make_parts.py" "$out/data"

# pack STAGE TEMPLATE TOKENIZER CAPACITY OPTION...
pack() {
    local stage="$1" template="$2" words="$3" capacity="$4"
    shift 4
    "$python" tools/pack_dataset.py --template "$template" --image_size 32 --patch_size 8 --pixels clip --tiling stretch \
        --jsonl "$out/data/train.jsonl" --root "$out/data/images" --tokenizer "$out/data/$words" \
        --capacity "$capacity" --tile_cap 32 --workers 0 --out "$out/packs/stage$stage" "$@"
}
step "packs"
pack 1 blip2_pairs words 352
pack 2 blip2 language 576 --tokens_per_tile 8

# train STAGE OPTION...
train() {
    step "training: stage $1"
    local stage="$1"
    shift
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" --stage "$stage" \
        --data.train "$out/packs/stage$stage" --checkpoint.save "$out/runs/stage$stage" --checkpoint.export_hf "$out/exported/stage$stage" "$@"
}
train 1 --init.vision "$out/data/vision"
train 2 --init.vision "$out/exported/stage1" --init.connector "$out/exported/stage1" --init.language "$out/data/language"

step "the first stage: scores of transformers, and what they find"
"$python" "$here/recall.py" "$out"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/stage2" --hf "$out/exported/stage2" --data "$out/packs/stage2" --packs 4 --json "$out/verify.json"

step "held-out images, captioned by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
