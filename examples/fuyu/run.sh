#!/usr/bin/env bash
# Fuyu, trained further: bash run.sh pack | 1 [option...]. `pack` runs on one node; the stage runs on every node of the job.
# Options go to the trainer (to the packer, for `pack`): bash run.sh 1 --parallel.tensor_model_parallel_size 8
#
#   export MODEL=fuyu-8b/
#   JSONL=/data/questions.jsonl ROOT=/data/images bash examples/fuyu/run.sh pack
#   bash examples/fuyu/run.sh 1                                        one node of 8 GPUs
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/fuyu/run.sh 1   the same on each of 2 nodes
#   sbatch --nodes 2 examples/fuyu/slurm.sh 1                          what a cluster with Slurm does
#
# MODEL       folder of a FuyuForCausalLM with its tokenizer
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
PACKS="${PACKS:-packs/fuyu}"
RUNS="${RUNS:-runs/fuyu}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true

case "$stage" in
    pack)
        # An image has up to 2,340 tokens.
        python "$root/tools/pack_dataset.py" --recipe fuyu --model "${MODEL:?name the folder of Fuyu}" --tokenizer "$MODEL" \
            --jsonl "${JSONL:?name the records}" --root "${ROOT:?name the folder of the images}" \
            --capacity 8192 --out "$PACKS/stage1" "$@"
        ;;
    1)
        exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
            --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-fuyu}" \
            "$root/pretrain_vlm.py" --recipe fuyu --stage 1 --model "${MODEL:?name the folder of Fuyu}" --checkpoint.load "$MODEL" \
            --data.train "$PACKS/stage1" --checkpoint.save "$RUNS/stage1" --checkpoint.export_hf "$RUNS/stage1-hf" \
            --parallel.tensor_model_parallel_size 2 --parallel.sequence_parallel true "$@"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 [option...]" >&2
        exit 2
        ;;
esac
