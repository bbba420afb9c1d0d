#!/usr/bin/env bash
# BLIP-2's second stage, small, on two CPU cores, in a few minutes.
#
#   bash examples/blip2/try.sh [OUT]      OUT: folder to make (default: blip2)
#
# It makes images of coloured shapes with captions, a small ViT that can see them and a small OPT that can write captions, packs the images as
# BLIP-2 does, trains the Q-Former between the two frozen parts, exports the model, compares it with transformers, and lets transformers caption
# held-out images. It ends with OUT/summary.json.
set -euo pipefail
started=$SECONDS
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "${1:-blip2}"
out="$(cd "${1:-blip2}" && pwd)"
if [[ -n "$(ls -A "$out")" ]]; then
    echo "examples/blip2/try.sh: error: $out holds something already; name another folder, or remove it" >&2
    exit 2
fi
cd "$here/../.."
python="${PYTHON:-python}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

step() { printf '\n== %s (after %d s)\n' "$1" $((SECONDS - started)); }

step "data, a ViT, a language model"
OMP_NUM_THREADS=2 "$python" "$here/make_parts.py" "$out/data"

step "packs"
"$python" tools/pack_dataset.py --template blip2 --image_size 32 --patch_size 8 --tokens_per_tile 8 --pixels clip --tiling stretch \
    --jsonl "$out/data/train.jsonl" --root "$out/data/images" --tokenizer "$out/data/language" \
    --capacity 576 --tile_cap 32 --workers 0 --out "$out/packs/stage2"

step "training: stage 2"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" \
    --init.vision "$out/data/vision" --init.language "$out/data/language" --data.train "$out/packs/stage2" \
    --checkpoint.save "$out/runs/stage2" --checkpoint.export_hf "$out/exported/stage2"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/stage2" --hf "$out/exported/stage2" --data "$out/packs/stage2" --packs 4 --json "$out/verify.json"

step "held-out images, captioned by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
