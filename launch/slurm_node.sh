#!/usr/bin/env bash
# Started by srun, once on every node (launch/slurm_common.sh): runs a program on each of the node's GPUs with torchrun.
#
#   slurm_node.sh PROGRAM [ARGUMENT ...]
#
# LATTE_FLOW_RANKS=N   processes per node; default: one per GPU, on a CPU one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_accelerator

if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=${LATTE_FLOW_RANKS:-1}
else
    # What torch sees, which CUDA_VISIBLE_DEVICES may make less than what nvidia-smi does.
    ranks=${LATTE_FLOW_RANKS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
fi
# Threads of all ranks together fill the node's cores (nproc counts those that the job has); torchrun's default is 1.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# SLURM sends a signal to every process of the step. The ranks act on it (training/monitor/preemption.py); the launcher must outlive
# their save: USR1 would end it, and at TERM it would kill them after 30 s. So it ignores both, and --signals-to-handle keeps
# torchrun from installing its own handler for TERM.
trap '' USR1 TERM
say "node $SLURM_NODEID of $SLURM_NNODES ($(hostname)): $ranks rank(s), $OMP_NUM_THREADS threads each, first node $MASTER_ADDR:$MASTER_PORT"
exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT "$@"
