#!/usr/bin/env bash
# CLIP, SigLIP or InternVL-C from pairs: bash run.sh pack STAGE | 1 | 2 | 3 [option...]. `pack` runs on one node; the others run on every node of the
# job. Options after the stage go to the trainer (to the packer, for `pack`): bash run.sh 1 --parallel.tensor_model_parallel_size 2
#
#   export RECIPE=internvl_c TOKENIZER=llama-7b/ LANGUAGE=llama-7b/
#   JSONL=/data/pairs.jsonl ROOT=/data/images bash examples/contrastive/run.sh pack 1
#   bash examples/contrastive/run.sh 1                                               one node of 8 GPUs
#   NNODES=80 MASTER_ADDR=node0 JOB_ID=7 bash examples/contrastive/run.sh 1          the same on each of 80 nodes
#   sbatch --nodes 80 examples/contrastive/slurm.sh 1                                what a cluster with Slurm does
#
# RECIPE      clip (default), siglip or internvl_c, which alone has stages 2 and 3
# TOKENIZER   folder of the tokenizer, for `pack`
# LANGUAGE    folder of the language model that stage 1 of internvl_c starts from; VISION: of an InternViT, else fresh weights
# JSONL ROOT  records of one image and one text, and the folder of their images, for `pack`
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
RECIPE="${RECIPE:-clip}"
PACKS="${PACKS:-packs/$RECIPE}"
RUNS="${RUNS:-runs/$RECIPE}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

usage() {
    echo "usage: RECIPE=clip|siglip|internvl_c bash run.sh pack STAGE | STAGE [option...]; stages are 1, and of internvl_c 2 and 3" >&2
    exit 2
}

# form STAGE: how images become squares, tokens of a text at most, pairs of a pack.
form() {
    case "$RECIPE.$1" in
        clip.1) echo crop 77 256 ;;
        siglip.1) echo stretch 64 256 ;;
        internvl_c.1) echo stretch 80 256 ;;
        internvl_c.2) echo stretch 80 256 ;;
        internvl_c.3) echo stretch 80 32 ;;
        *) return 1 ;;
    esac
}

# pack STAGE OPTION...: full packs have as many pairs as a stage's batch is counted in.
pack() {
    local stage="$1" tiling words pairs
    read -r tiling words pairs < <(form "$stage")
    shift
    if [[ ! -f "$PACKS/stage$stage/manifest.json" ]]; then
        python "$root/tools/pack_dataset.py" --recipe "$RECIPE" --stage "$stage" --tiling "$tiling" \
            --tokenizer "${TOKENIZER:?name the folder of the tokenizer}" --jsonl "${JSONL:?name the records}" \
            --root "${ROOT:?name the folder of the images}" --capacity "$((words * pairs))" --tile_cap "$pairs" --out "$PACKS/stage$stage" "$@"
    else
        echo "$PACKS/stage$stage is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
    fi
}

# train STAGE OPTION...: a stage, on this node's share of the job.
train() {
    local stage="$1"
    shift
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-$RECIPE}" \
        "$root/pretrain_vlm.py" --recipe "$RECIPE" --stage "$stage" --data.train "$PACKS/stage$stage" \
        --checkpoint.save "$RUNS/stage$stage" --checkpoint.export_hf "$RUNS/stage$stage-hf" "$@"
}

stage="${1:-}"
shift || true
case "$stage" in
    pack)
        form "${1:-}" >/dev/null || usage
        pack "$@"
        ;;
    1)
        form 1 >/dev/null || usage
        if [[ "$RECIPE" == internvl_c ]]; then
            train 1 --init.language "${LANGUAGE:?name the folder of the language model}" ${VISION:+--init.vision "$VISION"} "$@"
        fi
        train 1 "$@"
        ;;
    2 | 3)
        form "$stage" >/dev/null || usage
        before="$RUNS/stage$((stage - 1))"
        moments=fresh
        if [[ "$stage" == 2 ]]; then moments=keep; fi # it is the end of stage 1
        train "$stage" --model "$before-hf" --checkpoint.load "$before" --checkpoint.moments "$moments" "$@"
        ;;
    *) usage ;;
esac
