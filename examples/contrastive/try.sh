#!/usr/bin/env bash
# Contrastive pre-training on two CPU cores, in a few minutes: from images with captions to a CLIPModel of transformers, and what its encoders do.
#
#   bash examples/contrastive/try.sh [OUT]      OUT: folder to make (default: contrastive)
#
# It makes images and captions, packs them as pairs, trains a small CLIP with two data-parallel ranks and two cached microbatches on each, and
# exports it. The trained CLIP scores images of which a tenth have the caption of another one. Its image encoder starts InternVL's stage 1, before
# a language model that InternVL's stage 0 has taught to write captions from keywords. OUT/summary.json says how often transformers finds a
# held-out image's caption, and the reverse, with random weights and with the export; how far its similarities are from ours; how well the scores
# tell wrong captions from right ones; and the held-out loss of stage 1 on the way, at the end also with the images blanked.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_try.sh"

step "data, a language model"
"$python" "$here/make_data.py" "$out/data"
"$python" "$here/make_language.py" "$out/data"

# pack NAME TEMPLATE TOKENIZER OPTION...
pack() {
    local name="$1" template="$2" words="$3"
    shift 3
    "$python" tools/pack_dataset.py --template "$template" --image_size 32 --patch_size 8 --pixels clip --jsonl "$out/data/$name.jsonl" \
        --root "$out/data/images" --tokenizer "$out/data/$words" --capacity 512 --workers 0 --out "$out/packs/$name" "$@" \
        >"$out/pack_$name.log" 2>&1 || { cat "$out/pack_$name.log" >&2; exit 1; }
}
step "packs"
for name in train valid; do
    pack "$name" clip tokenizer --tiling crop --tile_cap 32
    pack "text_$name" internvl2_5 language
    pack "asked_$name" internvl2_5 language --max_tiles 1
done

train() { "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py "$@"; }
step "training: CLIP"
train --config "$here/try.yaml" --data.train "$out/packs/train" --data.valid "$out/packs/valid" \
    --checkpoint.save "$out/run" --checkpoint.export_hf "$out/exported"

step "scores of images, of which a tenth have another one's caption"
"$python" tools/score_dataset.py --model "$out/run" --jsonl "$out/data/mixed.jsonl" --root "$out/data/images" --workers 0 --out "$out/scores"

step "training: InternVL's stages 0 and 1, with CLIP's image encoder"
train --recipe internvl --stage 0,1 --init.vision "$out/exported" --init.language "$out/data/language" \
    --architecture.connector.pixel_shuffle 2 --architecture.connector.norm true --data.workers 0 --data.group 1 --training.precision float32 \
    --training.steps 150 --training.global_batch_size 4 --training.eval_interval 75 --optimizer.lr 3e-3 --optimizer.warmup_steps 10 \
    --checkpoint.save_interval 0 --logging.interval 50 --health.speed_check false --checkpoint.save "$out/internvl" \
    --for 0 "--data.train '$out/packs/text_train' --data.valid '$out/packs/text_valid'" \
    --for 1 "--data.train '$out/packs/asked_train' --data.valid '$out/packs/asked_valid' --eval.without_images true"

step "the export by transformers, and the summary"
"$python" "$here/measure.py" "$out" --seconds $((SECONDS - started))
