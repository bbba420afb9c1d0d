#!/usr/bin/env bash
# Qwen2.5-VL, or Qwen2-VL and Qwen3-VL (RECIPE=qwen2_vl, RECIPE=qwen3_vl): bash run.sh pack STAGE | 0 | 1 | 2 | 3 | sft | dpo | finetune [option...].
# `pack` runs on one node; the others run on every node of the job. Options after the stage go to the trainer (to the packer, for `pack`):
# bash run.sh 1 --parallel.tensor_model_parallel_size 4
#
# A published model on data of one's own:
#   export MODEL=Qwen2.5-VL-7B-Instruct/
#   JSONL=/data/chats.jsonl ROOT=/data/images bash examples/qwen2_5_vl/run.sh pack finetune
#   bash examples/qwen2_5_vl/run.sh finetune                                            one node of 8 GPUs
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/qwen2_5_vl/run.sh finetune        the same on each of 2 nodes
#   sbatch --nodes 2 examples/qwen2_5_vl/slurm.sh finetune                              what a cluster with Slurm does
# All stages, from a vision encoder and a language model (RECIPE=qwen2_vl: 1, 2 and sft; RECIPE=qwen3_vl: 0 to 3 and sft):
#   export VISION=Qwen2.5-VL-7B-Instruct/ LANGUAGE=Qwen2.5-7B/
#   JSONL=/data/captions.jsonl ROOT=/data/images bash examples/qwen2_5_vl/run.sh pack 1        and so on, each stage with its own data
#   bash examples/qwen2_5_vl/run.sh 1 && bash examples/qwen2_5_vl/run.sh 2                     then 3, sft and dpo
#
# MODEL       folder of a model of the recipe, such as a Qwen2_5_VLForConditionalGeneration, with its tokenizer, for finetune
# VISION      folder of such a model, whose vision encoder the first stage starts from
# LANGUAGE    folder of the language model with its tokenizer, for the first stage
# JSONL ROOT  records of conversations, and the folder of their images and videos, for `pack`; for dpo records of a preferred and a rejected answer. Videos
#             need `pip install 'megavlm[video]'`. Two frames a second are taken, up to 768; a pack of 8,192 tokens holds about a minute, and longer videos are
#             rejected unless there are fewer or smaller frames: bash run.sh pack finetune --max_frames 120, or --video_min_pixels 25088 (32 tokens a pair)
# MAX_PIXELS  pixels of an image in all its tiles, at most, for `pack` (default: what the model's image processor says; 784 pixels are a token;
#             published models say 12845056, 16384 tokens, and an image that is longer than a pack is rejected)
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh; for one GPU (GPUS_PER_NODE=1) add the options
#             --parallel.tensor_model_parallel_size 1 --parallel.sequence_parallel false
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
RECIPE="${RECIPE:-qwen2_5_vl}"
PACKS="${PACKS:-packs/$RECIPE}"
RUNS="${RUNS:-runs/$RECIPE}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true

# pack STAGE OPTION...: packs of as many tokens as the stage has, 8,192 to 262,144.
pack() {
    local stage="$1"
    shift
    if [[ ! -f "$PACKS/$stage/manifest.json" ]]; then
        python "$root/tools/pack_dataset.py" --recipe "$RECIPE" --stage "$stage" --model "${MODEL:-${VISION:?name the folder of the model as MODEL, or VISION}}" \
            --tokenizer "${MODEL:-${LANGUAGE:?name the folder of the model as MODEL, or LANGUAGE}}" --jsonl "${JSONL:?name the records}" \
            --root "${ROOT:?name the folder of the images and videos}" ${MAX_PIXELS:+--max_pixels "$MAX_PIXELS"} --out "$PACKS/$stage" "$@"
    else
        echo "$PACKS/$stage is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
    fi
}

# train STAGE OPTION...: a stage, on this node's share of the job.
train() {
    local stage="$1"
    shift
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-$RECIPE}" \
        "$root/pretrain_vlm.py" --recipe "$RECIPE" --stage "$stage" --data.train "$PACKS/$stage" \
        --checkpoint.save "$RUNS/$stage" --checkpoint.export_hf "$RUNS/$stage-hf" \
        --parallel.tensor_model_parallel_size 2 --parallel.sequence_parallel true "$@"
}

# follow STAGE BEFORE OPTION...: a stage, from where another one ended.
follow() {
    local stage="$1" before="$2"
    shift 2
    train "$stage" --model "$RUNS/$before-hf" --checkpoint.load "$RUNS/$before" "$@"
}

# begin STAGE OPTION...: the first stage, from a vision encoder and a language model.
begin() {
    train "$@" --init.vision "${VISION:?name the folder of the vision encoder}" --init.language "${LANGUAGE:?name the folder of the language model}"
}

first=1
last=3
stages="1 | 2 | 3 | sft | dpo | finetune"
[[ "$RECIPE" == qwen3_vl ]] && first=0 && stages="0 | 1 | 2 | 3 | sft | finetune"
[[ "$RECIPE" == qwen2_vl ]] && last=2 && stages="1 | 2 | sft | finetune"
case "$stage" in
    pack)
        case "${1:-}" in
            0 | 1 | 2 | 3 | sft | finetune) pack "$@" ;;
            dpo) pack "$@" --preferences ;;
            *) echo "usage: bash run.sh pack $stages [option...]" >&2 && exit 2 ;;
        esac
        ;;
    "$first") begin "$first" "$@" ;;
    1) follow 1 0 "$@" ;;
    2) follow 2 1 "$@" ;;
    3) follow 3 2 "$@" ;;
    sft) follow sft "$last" "$@" ;;
    dpo) follow dpo sft "$@" ;;
    finetune) train finetune --model "${MODEL:?name the folder of the model}" --checkpoint.load "$MODEL" "$@" ;;
    *)
        echo "usage: bash run.sh pack STAGE | $stages [option...]" >&2
        exit 2
        ;;
esac
