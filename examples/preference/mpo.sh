#!/usr/bin/env bash
# InternVL2.5-8B on preferences (MPO, DPO): bash mpo.sh pack | train [option...]. `pack` runs on one node; `train` runs on every node of the job.
# Options go to the packer, or to the trainer. Plain DPO instead of MPO:
#   bash mpo.sh train --architecture.preference.dpo 1 --architecture.preference.bco 0 --architecture.preference.sft 0
#
#   export MODEL=InternVL2_5-8B/
#   META=MMPR-v1.1/meta.json bash examples/preference/mpo.sh pack
#   bash examples/preference/mpo.sh train                                         one node of 8 GPUs
#   NNODES=8 MASTER_ADDR=node0 JOB_ID=7 bash examples/preference/mpo.sh train     the same on each of 8 nodes
#   sbatch --nodes 8 examples/preference/slurm.sh train                           what a cluster with Slurm does
#
# MODEL       folder of InternVL2_5-8B, in OpenGVLab's or transformers' format: its weights are what training starts from and the reference, and
#             `pack` takes its tokenizer
# LOAD        a checkpoint of megavlm (runs/internvl2_5_8b/stage2) in the place of MODEL's weights
# META        meta file of the preferences, as MMPR has it: {name: {"root", "annotation", "repeat_time", ...}}; each annotation file is JSONL with
#             image, question, chosen, rejected. A repeat_time below 1 takes a share of an entry: the reference's probabilities are computed for every
#             pair that is packed, so pack what you train on (InternVL: 400,000 of 3 million pairs)
# PACKS RUNS  where packs and checkpoints go
# STEPS       steps, instead of those in mpo.yaml
# REFERENCE   folder of the reference's probabilities (default: RUNS/mpo/reference). Runs that differ in settings alone share one
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# A run that is started again goes on from its last checkpoint, and before that with the reference's probabilities. Nothing here was run on a GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
PACKS="${PACKS:-packs/internvl2_5_8b}"
RUNS="${RUNS:-runs/internvl2_5_8b}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

command="${1:-}"
shift || true

case "$command" in
    pack)
        if [[ ! -f "$PACKS/mpo/manifest.json" ]]; then
            python "$root/tools/pack_dataset.py" --recipe internvl --stage mpo --model internvl2_5-8b --meta "${META:?name the meta file}" \
                --tokenizer "${MODEL:?name the folder of the model}" --capacity 16384 --max_tiles 12 --out "$PACKS/mpo" "$@"
        else
            echo "$PACKS/mpo is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
        fi
        ;;
    train)
        steps=() reference=()
        if [[ -n "${STEPS:-}" ]]; then steps=(--training.steps "$STEPS"); fi
        if [[ -n "${REFERENCE:-}" ]]; then reference=(--data.reference "$REFERENCE"); fi
        exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
            --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-internvl2_5_8b_mpo}" \
            "$root/pretrain_vlm.py" --config "$here/mpo.yaml" --data.train "$PACKS/mpo" --checkpoint.load "${LOAD:-${MODEL:?name the folder of the model}}" \
            --checkpoint.save "$RUNS/mpo" --checkpoint.export_hf "$RUNS/mpo-hf" "${reference[@]}" "${steps[@]}" "$@"
        ;;
    *)
        echo "usage: bash mpo.sh pack | train [option...]" >&2
        exit 2
        ;;
esac
