#!/usr/bin/env bash
# InternVL2.5-8B from its parts: bash run.sh pack | 1 | 1.5 | 2 | all [option...]. `pack` runs on one node; the others run on every node of
# the job. Options after the stage go to the trainer (to the packer, for `pack`): bash run.sh 1 --training.global_batch_size 64
#
#   DATA=/data TOKENIZER=internlm2_5-7b-chat/ bash examples/internvl2_5_8b/run.sh pack
#   export VISION=InternViT-300M-448px/ LANGUAGE=internlm2_5-7b-chat/
#   STEPS=2000 bash examples/internvl2_5_8b/run.sh all                                       one node of 8 GPUs
#   STEPS=2000 NNODES=8 MASTER_ADDR=node0 JOB_ID=7 bash examples/internvl2_5_8b/run.sh all   the same on each of 8 nodes
#   STEPS=2000 sbatch --nodes 64 examples/internvl2_5_8b/slurm.sh all                        what a cluster with Slurm does
#
# NNODES      nodes of the job
# MASTER_ADDR one of them, by a name that all of them know: the nodes meet there, at MASTER_PORT, and number themselves
# JOB_ID      any word, the same on every node and unlike another job's
# DATA        holds stage1.json, stage1_5.json and stage2.json: lists of annotation files, as tools/pack_dataset.py reads them
# TOKENIZER   folder of the language model's tokenizer
#             (tokenizer.json, or InternLM's tokenizer.model; its Python code is never run)
# VISION LANGUAGE  what stage 1 starts from: folders of InternViT-300M-448px and of internlm2_5-7b-chat, as they are published
# INIT        or a whole model: a checkpoint of megavlm, or a Hugging Face folder. With none of them stage 1 starts from fresh weights: good
#             for measuring speed, of no use for a model.
# PACKS RUNS  where packs and checkpoints go
# STEPS       steps of each stage that is run, instead of those in the YAML files. `all` needs it: InternVL's own numbers are a bound for stages
#             1 and 1.5 (100000), and how much is worth training depends on the data
# STOP_FILE   file whose appearance asks the job to save and end (slurm.sh makes it), looked for every STOP_INTERVAL_S seconds
#
# The layouts in the YAML files are estimated for GPUs of 80 GB, not measured. A run that is started again goes on from its last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."

PACKS="${PACKS:-packs/internvl2_5_8b}"
RUNS="${RUNS:-runs/internvl2_5_8b}"

# On SIGTERM the trainer continues to the next logged step and saves; torchrun's own patience, 30 seconds, is too short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true
options=("$@")
steps=()
if [[ -n "${STEPS:-}" ]]; then steps=(--training.steps "$STEPS"); fi

pack() {
    for name in stage1 stage1_5 stage2; do
        if [[ ! -f "$PACKS/$name/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --model internvl2_5-8b --meta "${DATA:?name the folder of the meta files}/$name.json" \
                --tokenizer "${TOKENIZER:?name the folder of the tokenizer}" --capacity 16384 --max_tiles 12 --out "$PACKS/$name" "${options[@]}"
        else
            echo "$PACKS/$name is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
        fi
    done
}

# What stage 1 starts from.
start=()
if [[ -n "${INIT:-}" ]]; then start+=(--checkpoint.load "$INIT"); fi
if [[ -n "${VISION:-}" ]]; then start+=(--init.vision "$VISION"); fi
if [[ -n "${LANGUAGE:-}" ]]; then start+=(--init.language "$LANGUAGE"); fi
if [[ -n "${LANGUAGE:-}" && -n "${TOKENIZER:-}" ]]; then start+=(--init.tokenizer "$TOKENIZER"); fi

# train NAME OPTION...: a stage, on this node's share of the job. SIGTERM, or the appearance of STOP_FILE, is passed on to torchrun alone, which
# tells the ranks once; a second signal would end them before they have saved.
train() {
    local name="$1" child
    shift
    torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-internvl2_5_8b}" \
        "$root/pretrain_vlm.py" --config "$here/$name.yaml" --data.train "$PACKS/$name" --checkpoint.save "$RUNS/$name" "$@" "${steps[@]}" "${options[@]}" &
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

# is_done NAME: whether a stage has reached its last step; --training.max_hours may end it before.
is_done() {
    [[ "$(cat "$RUNS/$1/latest" 2>/dev/null)" == "$(printf 'step_%08d' "$STEPS")" ]] && return
    echo "$1 is not at step $STEPS yet: the same command goes on with it" >&2
    return 1
}

case "$stage" in
    pack) pack ;;
    1) train stage1 "${start[@]}" ;;
    1.5) train stage1_5 --checkpoint.load "$RUNS/stage1" ;;
    2) train stage2 --checkpoint.load "$RUNS/stage1_5" ;;
    all)
        : "${STEPS:?how many steps each stage takes; or run the stages one by one: bash run.sh 1}"
        train stage1 "${start[@]}"
        is_done stage1 || exit 0
        train stage1_5 --checkpoint.load "$RUNS/stage1"
        is_done stage1_5 || exit 0
        train stage2 --checkpoint.load "$RUNS/stage1_5"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 | 1.5 | 2 | all [option...]" >&2
        exit 2
        ;;
esac
