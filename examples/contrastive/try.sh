#!/usr/bin/env bash
# Contrastive pre-training on two CPU cores, in a few minutes: from images with captions to a CLIPModel of transformers.
#
#   bash examples/contrastive/try.sh [OUT]      OUT: folder to make (default: contrastive)
#
# It makes images and captions, packs them as pairs, trains a small CLIP with two data-parallel ranks and two cached microbatches on each,
# exports it, and measures with transformers how often an image finds its caption and a caption its image (OUT/summary.json).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

"$python" "$here/make_data.py" "$out/data"
for name in train valid; do
    "$python" tools/pack_dataset.py --template clip --tiling crop --image_size 32 --patch_size 8 --pixels clip \
        --jsonl "$out/data/$name.jsonl" --root "$out/data/images" --tokenizer "$out/data/tokenizer" \
        --capacity 512 --tile_cap 32 --workers 0 --out "$out/packs/$name"
done
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" \
    --data.train "$out/packs/train" --data.valid "$out/packs/valid" \
    --checkpoint.save "$out/run" --checkpoint.export_hf "$out/exported"
"$python" "$here/recall.py" "$out/data" "$out/exported" "$out/summary.json" $((SECONDS - started))
