#!/usr/bin/env bash
# InstructBLIP: bash run.sh pack | 1 [option...]. `pack` runs on one node; `1` runs on every node of the job. Options after the first word go to the
# trainer (to the packer, for `pack`).
#
#   export QFORMER=blip2-itm-vit-g/ LANGUAGE=vicuna-7b/ BERT=bert-base-uncased/
#   DATA=/data bash examples/instructblip/run.sh pack
#   bash examples/instructblip/run.sh 1                                     one node of 8 GPUs; ends with runs/instructblip/stage1-hf
#
# QFORMER     folder with a ViT and a Q-Former that reads texts: BLIP-2's first stage (Blip2ForImageTextRetrieval), or an InstructBLIP
# LANGUAGE    folder of the language model with its tokenizer, whose texts end with </s>. Weights must be in safetensors files
# BERT        folder of the Q-Former's tokenizer
# DATA        holds questions.jsonl, a record for each image with one question and one answer, and images/
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../.."
PACKS="${PACKS:-packs/instructblip}"
RUNS="${RUNS:-runs/instructblip}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true

case "$stage" in
    pack)
        python "$root/tools/pack_dataset.py" --recipe instructblip --truncate 416 --capacity 1024 --tile_cap 8 \
            --jsonl "${DATA:?name the folder of the questions}/questions.jsonl" --root "$DATA/images" --tokenizer "${LANGUAGE:?name the language model}" \
            --qformer_tokenizer "${BERT:?name the folder of a BERT}" --out "$PACKS/stage1" "$@"
        ;;
    1)
        exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
            --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-instructblip}" \
            "$root/pretrain_vlm.py" --recipe instructblip --stage 1 --data.train "$PACKS/stage1" --init.vision "${QFORMER:?name the folder of a Q-Former}" \
            --init.connector "$QFORMER" --init.language "${LANGUAGE:?name the language model}" --checkpoint.save "$RUNS/stage1" \
            --checkpoint.export_hf "$RUNS/stage1-hf" "$@"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 [option...]" >&2
        exit 2
        ;;
esac
