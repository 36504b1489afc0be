#!/usr/bin/env bash
# Started by srun for each rank (launch/slurm_common.sh): runs a program with the variables by which its ranks find each other.
#
#   slurm_rank.sh PROGRAM [ARGUMENT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_accelerator

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$ranks_per_node
# The threads of all ranks together fill the node's cores (nproc counts those of the job).
threads=$(($(nproc) / ranks_per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# SLURM sends signals to every process of the step. Ignored until the program handles them (training/monitor/preemption.py): one
# that arrives while it imports would end the whole job.
trap '' USR1 TERM
if [ "$SLURM_LOCALID" = 0 ]; then
    say "node $SLURM_NODEID of $SLURM_NNODES ($(hostname)): $ranks_per_node rank(s), $OMP_NUM_THREADS threads each, first node $MASTER_ADDR:$MASTER_PORT"
fi
exec python "$@"
