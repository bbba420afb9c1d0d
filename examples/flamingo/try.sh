#!/usr/bin/env bash
# Flamingo, small, on two CPU cores, in a few minutes.
#
#   bash examples/flamingo/try.sh [OUT]      OUT: folder to make (default: flamingo)
#
# It makes documents of images and words, a small CLIP that can see the images and a small Llama that can write the words, packs the documents,
# trains resampler and cross-attention between the two, which stay frozen, exports the model, compares it with transformers, and lets transformers
# say what held-out images show behind 0 to 4 examples. It ends with OUT/summary.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "documents, a CLIP, a language model"
"$python" "$here/make_parts.py" "$out/data"

step "packs"
for name in train valid; do
    "$python" tools/pack_dataset.py --template flamingo_plain --image_size 32 --patch_size 8 --pixels clip --tiling stretch \
        --jsonl "$out/data/${name}_documents.jsonl" --root "$out/data/images" --tokenizer "$out/data/language" \
        --capacity 256 --tile_cap 48 --workers 0 --out "$out/packs/$name"
done

step "training"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" \
    --init.vision "$out/data/vision" --init.language "$out/data/language" --data.train "$out/packs/train" --data.valid "$out/packs/valid" \
    --checkpoint.save "$out/run" --checkpoint.export_hf "$out/exported"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/run" --hf "$out/exported" --data "$out/packs/valid" --packs 4 --json "$out/verify.json"

step "held-out images behind examples, read by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
