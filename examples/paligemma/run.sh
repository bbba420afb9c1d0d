#!/usr/bin/env bash
# PaliGemma from its parts: bash run.sh pack STAGE | 1 | 2 | 2.5 | 3 [option...]. `pack` runs on one node; the others run on every node of the job.
# Options after the stage go to the trainer (to the packer, for `pack`): bash run.sh 1 --parallel.tensor_model_parallel_size 2
#
#   export VISION=siglip-so400m-patch14-224/ LANGUAGE=gemma-2b/
#   JSONL=/data/mixture.jsonl ROOT=/data/images bash examples/paligemma/run.sh pack 1
#   bash examples/paligemma/run.sh 1                                                    one node of 8 GPUs
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/paligemma/run.sh 1               the same on each of 2 nodes
#   sbatch --nodes 2 examples/paligemma/slurm.sh 1                                     what a cluster with Slurm does
#   MODEL=paligemma-3b-pt-224/ bash examples/paligemma/run.sh 3                         one task, from a published model
#
# With LANGUAGE=gemma-2-2b/ (9b, 27b), or MODEL=paligemma2-3b-pt-224/, it is PaliGemma 2.
#
# VISION LANGUAGE  folders of SigLIP and of Gemma with its tokenizer, for stage 1
# MODEL       folder of a PaliGemmaForConditionalGeneration that stage 3 starts from (default: what the stage FROM ended with)
# FROM        stage that stage 3 starts from (default: 1); its resolution is that of its packs
# JSONL ROOT  records of one question and one answer, and the folder of their images, for `pack`
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
PACKS="${PACKS:-packs/paligemma}"
RUNS="${RUNS:-runs/paligemma}"
FROM="${FROM:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true

# pixels STAGE: side of an image.
pixels() {
    case "$1" in 1) echo 224 ;; 2) echo 448 ;; 2.5) echo 896 ;; 3) pixels "$FROM" ;; *) return 1 ;; esac
}

# pack STAGE OPTION...: packs of about 5,000 tokens, one sample of the highest resolution.
pack() {
    local stage="$1"
    shift
    if [[ ! -f "$PACKS/stage$stage/manifest.json" ]]; then
        python "$root/tools/pack_dataset.py" --recipe paligemma --stage "$stage" --model "${VISION:-${MODEL:?name the folder of SigLIP as VISION, or MODEL}}" --image_size "$(pixels "$stage")" \
            --tokenizer "${LANGUAGE:-${MODEL:?name the folder of Gemma as LANGUAGE, or MODEL}}" --jsonl "${JSONL:?name the records}" \
            --root "${ROOT:?name the folder of the images}" --capacity 4608 --out "$PACKS/stage$stage" "$@"
    else
        echo "$PACKS/stage$stage is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
    fi
}

# train STAGE OPTION...: a stage, on this node's share of the job.
train() {
    local stage="$1"
    shift
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-paligemma}" \
        "$root/pretrain_vlm.py" --recipe paligemma --stage "$stage" --data.train "$PACKS/stage$stage" \
        --checkpoint.save "$RUNS/stage$stage" --checkpoint.export_hf "$RUNS/stage$stage-hf" "$@"
}

case "$stage" in
    pack)
        pixels "${1:-}" >/dev/null || { echo "usage: bash run.sh pack 1 | 2 | 2.5 | 3 [option...]" >&2; exit 2; }
        pack "$@"
        ;;
    1) train 1 --init.vision "${VISION:?name the folder of SigLIP}" --init.language "${LANGUAGE:?name the folder of Gemma}" "$@" ;;
    2) train 2 --model "$RUNS/stage1-hf" --checkpoint.load "$RUNS/stage1" "$@" ;;
    2.5) train 2.5 --model "$RUNS/stage2-hf" --checkpoint.load "$RUNS/stage2" "$@" ;;
    3)
        if [[ -n "${MODEL:-}" ]]; then
            train 3 --model "$MODEL" --checkpoint.load "$MODEL" "$@"
        fi
        train 3 --model "$RUNS/stage$FROM-hf" --checkpoint.load "$RUNS/stage$FROM" "$@"
        ;;
    *)
        echo "usage: bash run.sh pack STAGE | 1 | 2 | 2.5 | 3 [option...]" >&2
        exit 2
        ;;
esac
