#!/usr/bin/env bash
# Flamingo in the form of IDEFICS: bash run.sh pack | 1 [option...]. `pack` runs on one node; `1` runs on every node of the job. Options after the
# first word go to the trainer (to the packer, for `pack`): bash run.sh 1 --parallel.tensor_model_parallel_size 2
#
#   export VISION=CLIP-ViT-H-14-laion2B-s32B-b79K/ LANGUAGE=llama-7b/
#   DATA=/data bash examples/flamingo/run.sh pack
#   bash examples/flamingo/run.sh 1                                         one node of 8 GPUs
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/flamingo/run.sh 1     the same on each of 2 nodes
#   sbatch --nodes 2 examples/flamingo/slurm.sh 1                           what a cluster with Slurm does
#
# VISION      folder of CLIP's vision encoder, all layers of which are built
# LANGUAGE    folder of the language model with its tokenizer. Weights must be in safetensors files
# DATA        holds documents.jsonl (texts with <image> in them and lists of images; OBELICS and MMC4 are read too, see docs/data.md),
#             captions.jsonl (an image and its text each) and images/
# SHARES      packs of documents and of captions in each batch, as a share (default: 0.75,0.25)
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
PACKS="${PACKS:-packs/flamingo}"
RUNS="${RUNS:-runs/flamingo}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true
options=("$@")

# pack NAME OPTION...
pack() {
    local name="$1"
    shift
    if [[ ! -f "$PACKS/$name/manifest.json" ]]; then
        python "$root/tools/pack_dataset.py" --recipe flamingo \
            --jsonl "$DATA/$name.jsonl" --root "$DATA/images" --tokenizer "${LANGUAGE:?name the language model}" \
            --capacity 2048 --tile_cap 64 --out "$PACKS/$name" "$@" "${options[@]}"
    else
        echo "$PACKS/$name is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
    fi
}

case "$stage" in
    pack)
        : "${DATA:?name the folder of documents.jsonl, captions.jsonl and images}"
        pack documents --window_tokens 256 --window_images 5
        pack captions --truncate 64
        ;;
    1)
        exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
            --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-flamingo}" \
            "$root/pretrain_vlm.py" --recipe flamingo --stage 1 --data.train "$PACKS/documents,$PACKS/captions" \
            --data.weights "${SHARES:-0.75,0.25}" --data.batch_shares true --data.loss_weights 1.0,0.2 \
            --init.vision "${VISION:?name the folder of CLIP}" --init.language "${LANGUAGE:?name the language model}" \
            --checkpoint.save "$RUNS/stage1" --checkpoint.export_hf "$RUNS/stage1-hf" "${options[@]}"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 [option...]" >&2
        exit 2
        ;;
esac
