#!/usr/bin/env bash
# InternVL2.5-8B from its parts: bash run.sh pack | 1 | 1.5 | 2 | all. Run the same command on every node; `pack` on one is enough.
#
#   INIT=weights/ DATA=/data TOKENIZER=internlm2_5-7b-chat/ bash examples/internvl2_5_8b/run.sh pack
#   NNODES=64 NODE_RANK=$SLURM_NODEID MASTER_ADDR=node0 INIT=weights/ bash examples/internvl2_5_8b/run.sh all
#
# DATA        holds stage1.json, stage1_5.json and stage2.json: lists of annotation files, as tools/pack_dataset.py reads them
# TOKENIZER   folder of the language model's tokenizer
# INIT        what stage 1 starts from: a checkpoint of megavlm, or a model in Hugging Face's native InternVL format. The original weights
#             of InternViT and InternLM2.5 have other names inside and are not read yet, so without INIT stage 1 starts from fresh
#             weights: good for measuring speed, of no use for a model.
# PACKS RUNS  where packs and checkpoints go
#
# The layouts in the YAML files are reckoned for GPUs of 80 GB, not measured. A run that is started again goes on from its last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."

PACKS="${PACKS:-packs/internvl2_5_8b}"
RUNS="${RUNS:-runs/internvl2_5_8b}"

pack() {
    for name in stage1 stage1_5 stage2; do
        if [[ ! -f "$PACKS/$name/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --model internvl2_5-8b --meta "${DATA:?name the folder of the meta files}/$name.json" \
                --tokenizer "${TOKENIZER:?name the folder of the tokenizer}" --capacity 16384 --max_tiles 12 --out "$PACKS/$name"
        fi
    done
}

# train NAME [LOAD]
train() {
    local load=()
    if [[ -n "${2:-}" ]]; then load=(--checkpoint.load "$2"); fi
    torchrun --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${GPUS_PER_NODE:-8}" \
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
        "$root/pretrain_vlm.py" --config "$here/$1.yaml" --data.train "$PACKS/$1" --checkpoint.save "$RUNS/$1" "${load[@]}"
}

case "${1:-}" in
    pack) pack ;;
    1) train stage1 "${INIT:-}" ;;
    1.5) train stage1_5 "$RUNS/stage1" ;;
    2) train stage2 "$RUNS/stage1_5" ;;
    all)
        train stage1 "${INIT:-}"
        train stage1_5 "$RUNS/stage1"
        train stage2 "$RUNS/stage1_5"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 | 1.5 | 2 | all" >&2
        exit 2
        ;;
esac
