#!/usr/bin/env bash
# LLaVA 1.5, LLaVA-NeXT (1.6) or LLaVA-OneVision, from its parts: bash run.sh pack | 1 | 1.5 | 2 | 3 [option...]. `pack` runs on one node; the others run on every node of the job. Options
# after the stage go to the trainer (to the packer, for `pack`): bash run.sh 1 --parallel.tensor_model_parallel_size 2
#
#   export VISION=clip-vit-large-patch14-336/ LANGUAGE=vicuna-7b-v1.5/
#   DATA=/data bash examples/llava/run.sh pack
#   bash examples/llava/run.sh 1 && bash examples/llava/run.sh 2                        one node of 8 GPUs
#   NNODES=2 MASTER_ADDR=node0 JOB_ID=7 bash examples/llava/run.sh 1                    the same on each of 2 nodes
#   sbatch --nodes 2 examples/llava/slurm.sh 1                                          what a cluster with Slurm does
#
# VISION LANGUAGE  folders of CLIP (or SigLIP: docs/recipes.md) and of the language model with its tokenizer, as they are published. Weights must be in safetensors files; a
#             folder with pytorch_model*.bin only is turned into one with (AutoModelForCausalLM for a language model)
#             python -c "import sys, transformers as t; getattr(t, sys.argv[1]).from_pretrained(sys.argv[2], dtype='auto').save_pretrained(sys.argv[2])" CLIPModel DIR
# RECIPE      llava (the default), llava_next: images as grids of tiles, everything trained in stage 2; or llava_onevision: larger grids, stages 1.5 and 3 too
# DATA        holds blip_laion_cc_sbu_558k.json with images/, and llava_v1_5_mix665k.json with the image folders that it names; for llava_next
#             llava_1_6.json in its place; for llava_onevision stage1.5.json, stage2.json and stage3.json, meta files of its sources (docs/data.md)
# TEMPLATE    behind stage 1: llava_v1 (Vicuna, Llama, Mistral), llava_chatml (the default of llava_onevision) for language models that end an answer with
#             <|im_end|>, or llava_mistral for Mistral's [INST] (llava_next)
# PACKS RUNS  where packs and checkpoints go
# NNODES MASTER_ADDR MASTER_PORT JOB_ID GPUS_PER_NODE  as in examples/internvl2_5_8b/run.sh
#
# Nothing here was measured on a GPU.
# A run that is started again goes on from its last checkpoint. With more steps (--training.steps) than its export has, it needs another folder for that:
#   --checkpoint.export_hf DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$here/../.."
RECIPE="${RECIPE:-llava}"
PACKS="${PACKS:-packs/$RECIPE}"
RUNS="${RUNS:-runs/$RECIPE}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

stage="${1:-}"
shift || true
options=("$@")

# pack STAGE OPTION...
pack() {
    local stage="$1" name="stage$1"
    shift
    if [[ ! -f "$PACKS/$name/manifest.json" ]]; then
        python "$root/tools/pack_dataset.py" --recipe "$RECIPE" --stage "$stage" --model "${VISION:?name the folder of CLIP}" --tokenizer "${LANGUAGE:?name the language model}" \
            --out "$PACKS/$name" "$@" "${options[@]}"
    else
        echo "$PACKS/$name is packed already, so nothing is done; to pack with other options or data, remove it or set PACKS" >&2
    fi
}

# train NAME OPTION...: a stage, on this node's share of the job.
train() {
    local name="$1"
    shift
    exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts 0 \
        --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-$RECIPE}" \
        "$root/pretrain_vlm.py" --recipe "$RECIPE" --data.train "$PACKS/$name" --checkpoint.save "$RUNS/$name" \
        --checkpoint.export_hf "$RUNS/$name-hf" "$@" "${options[@]}"
}

case "$stage" in
    pack)
        : "${DATA:?name the folder of the annotation files}"
        captions=(--jsonl "$DATA/blip_laion_cc_sbu_558k.json" --root "$DATA/images" --truncate 2048)
        template=(${TEMPLATE:+--template "$TEMPLATE"})
        case "$RECIPE" in
            llava) second=(llava_v1_5_mix665k.json --capacity 4096 --truncate 2048) ;;
            llava_next) second=(llava_1_6.json --capacity 8192 --truncate 4096) ;;
            llava_onevision)
                pack 1 "${captions[@]}" --capacity 6144
                for stage in 1.5 2 3; do
                    pack "$stage" --meta "$DATA/stage$stage.json" "${template[@]}" --capacity 32768 --truncate 16384 --frame_sampling fps1 --max_frames 32
                done
                exit
                ;;
            *) echo "RECIPE=$RECIPE: must be llava, llava_next or llava_onevision" >&2 && exit 2 ;;
        esac
        pack 1 "${captions[@]}" --capacity 4864
        pack 2 --jsonl "$DATA/${second[0]}" --root "$DATA" "${template[@]}" "${second[@]:1}"
        ;;
    1) train stage1 --stage 1 --init.vision "${VISION:?name the folder of CLIP}" --init.language "${LANGUAGE:?name the language model}" ;;
    1.5 | 2 | 3)
        before=stage1
        [[ "$RECIPE $stage" == "llava_onevision 2" ]] && before=stage1.5
        [[ "$stage" == 3 ]] && before=stage2
        train "stage$stage" --stage "$stage" --model "$RUNS/$before-hf" --checkpoint.load "$RUNS/$before"
        ;;
    *)
        echo "usage: bash run.sh pack | 1 | 1.5 | 2 | 3 [option...]" >&2
        exit 2
        ;;
esac
