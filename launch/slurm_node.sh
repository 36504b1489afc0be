#!/usr/bin/env bash
# Started by srun once on every node (launch/slurm_common.sh): runs a program on each of the node's GPUs with torchrun.
#
#   slurm_node.sh PROGRAM [ARGUMENT ...]
#
# LATTE_FLOW_RANKS=N   processes per node; default: one per GPU, or one on a CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_accelerator

if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=${LATTE_FLOW_RANKS:-1}
else
    # The GPUs visible to torch; with CUDA_VISIBLE_DEVICES these may be fewer than nvidia-smi shows.
    ranks=${LATTE_FLOW_RANKS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
fi
# The threads of all ranks together fill the node's cores (nproc counts those of the job); torchrun's default is 1.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# SLURM sends signals to every process of the step. The ranks handle them (training/monitor/preemption.py); the launcher must
# outlive their save, but USR1 would end it, and on TERM it would kill the ranks after 30 s. So it ignores both signals, and
# --signals-to-handle keeps torchrun from installing its own handler for TERM.
trap '' USR1 TERM
say "node $SLURM_NODEID of $SLURM_NNODES ($(hostname)): $ranks rank(s), $OMP_NUM_THREADS threads each, first node $MASTER_ADDR:$MASTER_PORT"
exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT "$@"
