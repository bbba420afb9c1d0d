#!/usr/bin/env bash
# Qwen2.5-VL, or Qwen2-VL and Qwen3-VL, on a cluster with Slurm: one task a node, which starts torchrun for the node's GPUs.
#
#   MODEL=Qwen2.5-VL-7B-Instruct/ sbatch --nodes 2 examples/qwen2_5_vl/slurm.sh finetune      0, 1, 2, 3, sft or dpo for the other stages
#
# The data, images and videos, are packed before, on one node: `run.sh pack STAGE` there says how.
# Submit it from the project's folder, on a file system that all nodes share. Variables of run.sh are passed on. The same command again goes on
# from the last checkpoint.
#SBATCH --job-name=qwen2_5_vl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${1:?name a stage: 0, 1, 2, 3, sft, dpo or finetune; options for the trainer may follow}"

source examples/start_slurm.sh
srun --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}" bash examples/qwen2_5_vl/run.sh "$@"
