#!/usr/bin/env bash
# BLIP-2's two stages: bash run.sh pack1 | 1 | pack | 2 [option...]. `pack1` and `pack` run on one node; `1` and `2` run on every node of the job.
# Options after the first word go to the trainer (to the packer, for `pack1` and `pack`): bash run.sh 2 --parallel.tensor_model_parallel_size 2
#
#   export VISION=blip2-opt-2.7b/ BERT=bert-base-uncased/ LANGUAGE=opt-2.7b/
#   DATA=/data bash examples/blip2/run.sh pack1                             pairs for the first stage
#   bash examples/blip2/run.sh 1                                            one node of 8 GPUs; ends with runs/blip2/stage1-hf
#   DATA=/data bash examples/blip2/run.sh pack                              captions for the second stage
#   QFORMER=runs/blip2/stage1-hf bash examples/blip2/run.sh 2               or QFORMER=blip2-itm-vit-g/, without a first stage of one's own
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/blip2/run.sh 2        the same on each of 2 nodes
#   sbatch --nodes 2 examples/blip2/slurm.sh 2                              what a cluster with Slurm does
#
# VISION      folder that the first stage takes the ViT from: any BLIP-2, or a CLIP
# BERT        folder that the Q-Former starts as, with the tokenizer of the first stage
# QFORMER     folder of a BLIP-2 with its ViT and its Q-Former, of the first stage (Blip2ForImageTextRetrieval) or another one
# LANGUAGE    folder of the language model with its tokenizer, which puts the token that begins a text in front of it. Weights must be in
#             safetensors files
# DATA        holds captions.jsonl, a record for each image with its caption as the answer, and images/
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
PACKS="${PACKS:-packs/blip2}"
RUNS="${RUNS:-runs/blip2}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true
options=("$@")

train() {
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-blip2}" \
        "$root/pretrain_vlm.py" --recipe blip2 --stage "$stage" --data.train "$PACKS/stage$stage" --checkpoint.save "$RUNS/stage$stage" \
        --checkpoint.export_hf "$RUNS/stage$stage-hf" "$@" "${options[@]}"
}

case "$stage" in
    pack1)
        if [[ ! -f "$PACKS/stage1/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --recipe blip2 --stage 1 --data_augment \
                --jsonl "${DATA:?name the folder of the captions}/captions.jsonl" --root "$DATA/images" --tokenizer "${BERT:?name the folder of a BERT}" \
                --capacity 1344 --tile_cap 42 --out "$PACKS/stage1" "${options[@]}"
        else
            echo "$PACKS/stage1 is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
        fi
        ;;
    1)
        train --init.vision "${VISION:?name the folder of a ViT}" --init.connector "${BERT:?name the folder of a BERT}" --data.augment half_crop,flip
        ;;
    pack)
        if [[ ! -f "$PACKS/stage2/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --recipe blip2 --stage 2 \
                --jsonl "${DATA:?name the folder of the captions}/captions.jsonl" --root "$DATA/images" --tokenizer "${LANGUAGE:?name the language model}" \
                --truncate 64 --capacity 2304 --tile_cap 48 --out "$PACKS/stage2" "${options[@]}"
        else
            echo "$PACKS/stage2 is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
        fi
        ;;
    2)
        train --init.vision "${QFORMER:?name the folder of a BLIP-2}" --init.connector "$QFORMER" --init.language "${LANGUAGE:?name the language model}"
        ;;
    *)
        echo "usage: bash run.sh pack1 | 1 | pack | 2 [option...]" >&2
        exit 2
        ;;
esac
