#!/usr/bin/env bash
# InternVL3.5-30B-A3B on instructions: bash run.sh pack | train [option...]. `pack` runs on one node; `train` runs on every node of the job.
# Options behind it go to the packer, or to the trainer.
#
#   MODEL=InternVL3_5-30B-A3B-Pretrained/ META=/data/mixture.json bash examples/internvl3_5_30b_a3b/run.sh pack
#   MODEL=InternVL3_5-30B-A3B-Pretrained/ NNODES=8 MASTER_ADDR=node0 JOB_ID=7 bash examples/internvl3_5_30b_a3b/run.sh train
#
# Eight nodes with less than 540 GB of memory each, which a save takes: experts over eight ranks, up to 105 GB
#   ... NNODES=8 run.sh train --parallel.expert_model_parallel_size 8
#
# Two nodes of 8 GPUs, with experts over eight ranks:
#   ... NNODES=2 run.sh train --parallel.pipeline_model_parallel_size 2 --parallel.context_parallel_size 4 \
#       --parallel.expert_model_parallel_size 8 --parallel.recompute full --optimizer.moments bfloat16
#
# MODEL       Hugging Face folder of the model, in either format
# META        list of annotation files, as tools/pack_dataset.py reads it
# NNODES      nodes of the job; the nodes meet at MASTER_ADDR, MASTER_PORT; JOB_ID is any word, the same on every node
# PACKS RUNS  where packs and checkpoints go
#
# The layouts are estimated for GPUs of 80 GB, not measured. A run that is started again goes on from its last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."

PACKS="${PACKS:-packs/internvl3_5_30b_a3b}"
RUNS="${RUNS:-runs/internvl3_5_30b_a3b}"
# On SIGTERM the trainer continues to the next logged step and saves; torchrun's own patience, 30 seconds, is too short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

task="${1:-}"
shift || true
MODEL="${MODEL:?name the Hugging Face folder of the model}"

case "$task" in
pack)
    # Context parallelism over four ranks cuts samples into eight pieces.
    exec python "$root/tools/pack_dataset.py" --model "$MODEL" --tokenizer "$MODEL" --meta "${META:?name the list of annotation files}" \
        --capacity 16384 --max_tiles 12 --alignment 8 --out "$PACKS" "$@"
    ;;
train)
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-internvl3_5_30b_a3b}" \
        "$root/pretrain_vlm.py" --config "$here/stage2.yaml" --checkpoint.load "$MODEL" --data.train "$PACKS" --checkpoint.save "$RUNS" "$@"
    ;;
*)
    echo "usage: bash run.sh pack | train [option...]" >&2
    exit 2
    ;;
esac
