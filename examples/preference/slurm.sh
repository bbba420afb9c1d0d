#!/usr/bin/env bash
# InternVL2.5-8B on preferences, on a cluster with Slurm: one task a node, which starts torchrun for the node's GPUs.
#
#   MODEL=InternVL2_5-8B/ sbatch --nodes 8 examples/preference/slurm.sh train
#
# Submit it from the project's folder, on a file system that all nodes share. Variables of mpo.sh are passed on. The same command again goes on
# from the last checkpoint.
#SBATCH --job-name=internvl2_5_8b_mpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${1:?say what to do: train; options for the trainer may follow}"

source examples/start_slurm.sh
srun --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}" bash examples/preference/mpo.sh "$@"
