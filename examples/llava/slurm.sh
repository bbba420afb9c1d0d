#!/usr/bin/env bash
# LLaVA on a cluster with Slurm: one task a node, which starts torchrun for the node's GPUs.
#
#   VISION=clip/ LANGUAGE=vicuna/ sbatch --nodes 2 examples/llava/slurm.sh 1      stage 1; 2 for the other
#
# Submit it from the project's folder, on a file system that all nodes share. Variables of run.sh are passed on. The same command again goes on
# from the last checkpoint.
#SBATCH --job-name=llava
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${1:?name a stage: 1 or 2; options for the trainer may follow}"

source examples/start_slurm.sh
srun --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}" bash examples/llava/run.sh "$@"
