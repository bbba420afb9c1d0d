#!/usr/bin/env bash
# InstructBLIP, small, on two CPU cores, in a few minutes.
#
#   bash examples/instructblip/try.sh [OUT]      OUT: folder to make (default: instructblip)
#
# It makes images of coloured shapes with questions, a small ViT that can see them and a small Llama that can answer behind keywords, packs the
# questions as InstructBLIP does, trains the Q-Former between the two, which are frozen, exports it, compares it with transformers, and lets
# transformers answer questions about held-out images. It ends with OUT/summary.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data, a ViT, a language model"
"$python" "$here/make_parts.py" "$out/data"

step "packs"
"$python" tools/pack_dataset.py --template instructblip --image_size 32 --patch_size 8 --tokens_per_tile 8 --pixels clip --tiling stretch \
    --jsonl "$out/data/questions.jsonl" --root "$out/data/images" --tokenizer "$out/data/language" --qformer_tokenizer "$out/data/words" \
    --instruction_length 8 --capacity 512 --tile_cap 32 --workers 0 --out "$out/packs/stage1"

step "training"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/try.yaml" --stage 1 \
    --data.train "$out/packs/stage1" --checkpoint.save "$out/runs/stage1" --checkpoint.export_hf "$out/exported/stage1" \
    --init.vision "$out/data/vision" --init.language "$out/data/language"

step "the exported model against the trained one"
"$python" tools/verify_export.py --load "$out/runs/stage1" --hf "$out/exported/stage1" --data "$out/packs/stage1" --packs 4 --json "$out/verify.json"

step "questions about held-out images, answered by transformers"
"$python" "$here/answer.py" "$out" --seconds $((SECONDS - started))
