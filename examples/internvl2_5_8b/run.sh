#!/usr/bin/env bash
# InternVL2.5-8B from its parts: bash run.sh pack | 1 | 1.5 | 2 | all. `pack` runs on one node; the others run on every node of the job.
#
#   DATA=/data TOKENIZER=internlm2_5-7b-chat/ bash examples/internvl2_5_8b/run.sh pack
#   INIT=weights/ bash examples/internvl2_5_8b/run.sh all                                          one node of 8 GPUs
#   NNODES=8 MASTER_ADDR=node0 JOB_ID=7 INIT=weights/ bash examples/internvl2_5_8b/run.sh all      the same on each of 8 nodes
#   sbatch --nodes 64 examples/internvl2_5_8b/slurm.sh all                                         what a cluster with Slurm does
#
# NNODES      nodes of the job
# MASTER_ADDR one of them, by a name that all of them know: the nodes meet there, at MASTER_PORT, and number themselves
# JOB_ID      any word, the same on every node and unlike another job's
# DATA        holds stage1.json, stage1_5.json and stage2.json: lists of annotation files, as tools/pack_dataset.py reads them
# TOKENIZER   folder of the language model's tokenizer
# INIT        what stage 1 starts from: a checkpoint of megavlm, or a model in Hugging Face's native InternVL format. The original weights
#             of InternViT and InternLM2.5 have other names inside and are not read yet, so without INIT stage 1 starts from fresh
#             weights: good for measuring speed, of no use for a model.
# PACKS RUNS  where packs and checkpoints go
# STOP_FILE   file whose appearance asks the job to save and end (slurm.sh makes it), looked for every STOP_INTERVAL_S seconds
#
# The layouts in the YAML files are reckoned for GPUs of 80 GB, not measured. A run that is started again goes on from its last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."

PACKS="${PACKS:-packs/internvl2_5_8b}"
RUNS="${RUNS:-runs/internvl2_5_8b}"

# On SIGTERM the trainer goes on to the next logged step and saves; torchrun's own patience, 30 seconds, is too short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

pack() {
    for name in stage1 stage1_5 stage2; do
        if [[ ! -f "$PACKS/$name/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --model internvl2_5-8b --meta "${DATA:?name the folder of the meta files}/$name.json" \
                --tokenizer "${TOKENIZER:?name the folder of the tokenizer}" --capacity 16384 --max_tiles 12 --out "$PACKS/$name"
        fi
    done
}

# train NAME [LOAD]: a stage, on this node's share of the job. SIGTERM, or the appearance of STOP_FILE, is passed on to torchrun alone, which
# tells the ranks once; a second signal would end them before they have saved.
train() {
    local load=() child
    if [[ -n "${2:-}" ]]; then load=(--checkpoint.load "$2"); fi
    torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-internvl2_5_8b}" \
        "$root/pretrain_vlm.py" --config "$here/$1.yaml" --data.train "$PACKS/$1" --checkpoint.save "$RUNS/$1" "${load[@]}" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
    while kill -0 "$child" 2>/dev/null; do
        if [[ -n "${STOP_FILE:-}" && -e "$STOP_FILE" ]]; then
            kill -TERM "$child" 2>/dev/null || true
            break
        fi
        sleep "${STOP_INTERVAL_S:-10}" &
        wait -n || true # whichever ends first: torchrun, or the nap
    done
    wait "$child"
    trap - TERM INT
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
