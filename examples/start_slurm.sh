# Sourced by the slurm.sh of the examples, in the project's folder: tells run.sh which nodes a job has.
export NNODES="$SLURM_JOB_NUM_NODES" GPUS_PER_NODE="${SLURM_GPUS_ON_NODE:-8}" JOB_ID="$SLURM_JOB_ID"
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # the first of them
export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
# Threads of the training process; loader processes take one each (--data.workers).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# torchrun's store has four connections to each rank, and the usual limit is 1,024.
ulimit -n "$(ulimit -H -n)"
