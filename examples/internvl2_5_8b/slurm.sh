#!/usr/bin/env bash
# InternVL2.5-8B on a cluster with Slurm: one task a node, which starts torchrun for the node's GPUs.
#
#   INIT=/shared/weights sbatch --nodes 64 examples/internvl2_5_8b/slurm.sh 1        stage 1; 1.5, 2 or all for the others
#   IMAGE=/shared/megavlm.sqsh sbatch --nodes 64 examples/internvl2_5_8b/slurm.sh 2  inside a container (pyxis)
#
# Submit it from the project's folder, on a file system that all nodes share. A quarter of an hour before the time limit the trainer is asked
# to save, and the job is put back into the queue, where it resumes from that checkpoint; so it is after a failure, such as a rank that was
# killed, if it has saved a checkpoint since it began. Variables of run.sh (PACKS, RUNS, VISION, LANGUAGE, INIT, ...) are passed on.
#SBATCH --job-name=internvl2_5_8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${1:?name a stage: 1, 1.5, 2 or all; options for the trainer may follow}"

source examples/start_slurm.sh

# How NCCL finds the network; docs/performance.md tells how to see which way it took.
#   NCCL_SOCKET_IFNAME  interface over which ranks find each other (and speak, where there is no InfiniBand): never the management network
#   NCCL_IB_HCA         cards that carry the data, such as mlx5; only needed if the nodes have others, for storage
# Left as they are unless the cluster asks for it. What is never worth it in production: NCCL_DEBUG=INFO at every start, NCCL_P2P_DISABLE,
# NCCL_IB_DISABLE.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5

container=()
if [[ -n "${IMAGE:-}" ]]; then
    container=(--container-image "$IMAGE" --container-mounts "${MOUNTS:-$PWD}" --container-workdir "$PWD")
fi

# Slurm would send SIGTERM to every process of a step, ranks and loaders included. It is sent to this script alone (B:), which leaves a file
# for run.sh on every node to find.
STOP_FILE="$PWD/.stop-$SLURM_JOB_ID"
export STOP_FILE
rm -f "$STOP_FILE"
trap 'touch "$STOP_FILE"' TERM
# The checkpoints to resume from: a job that fails again without a newer one stays ended.
saved() { cat "${RUNS:-runs/internvl2_5_8b}"/*/latest 2>/dev/null || true; }
before="$(saved)"
# The job has its nodes for itself (--exclusive), so the step takes all CPUs of a node, however many there are.
cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
srun --kill-on-bad-exit=0 --cpus-per-task "$cpus" "${container[@]}" bash examples/internvl2_5_8b/run.sh "$@" &
step=$! status=0
wait "$step" || status=$?
if [[ -e "$STOP_FILE" ]]; then
    wait "$step" || true # the first wait ended with the signal, not with the step
    rm -f "$STOP_FILE"
    scontrol requeue "$SLURM_JOB_ID"
elif ((status)) && [[ "$(saved)" != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
