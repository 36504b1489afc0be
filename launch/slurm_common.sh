# shellcheck shell=bash
# Sourced by the SLURM batch scripts: environment, communication settings, one process per GPU, stopping and requeueing.
#
# LATTE_FLOW_RANKS=N         processes per node; default: one per GPU, or one on a CPU.
# LATTE_FLOW_LOGS=DIR        folder for the nodes' logs; default: runs/slurm in the repository.
# LATTE_FLOW_MASTER_ADDR=H   address of the job's first node for the other nodes; default: its address in SLURM.
# MASTER_PORT=N              its port; default: derived from the job id.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this script runs inside a SLURM job; start it with: sbatch launch/$(basename "$0")"

# Put the project's environment on PATH; install nothing, see launch/setup.sh.
use_environment() {
    if [ -n "${LATTE_FLOW_PYTHON:-}" ]; then
        [ -x "$LATTE_FLOW_PYTHON" ] || fail "LATTE_FLOW_PYTHON: $LATTE_FLOW_PYTHON is not an executable on $(hostname)"
        PATH="$(dirname "$LATTE_FLOW_PYTHON"):$PATH"
        export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local venv=${LATTE_FLOW_VENV:-$ROOT/.venv}
    [ -f "$venv/latte_flow.stamp" ] ||
        fail "$venv is not set up; run once on a login node: bash launch/setup.sh (or set LATTE_FLOW_PYTHON to your own Python)"
    PATH="$venv/bin:$PATH"
    export PATH
}

# Settings for all ranks. Values already set by the cluster or the user are kept.
export_settings() {
    # Warnings name the network interface or node that failed; INFO would write megabytes on every start.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # InfiniBand retries for up to about 17 s instead of 1 s, so that a short link failure does not end a multi-node job.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # If one rank fails, the collective ends the other ranks with an error after its timeout. Torch's default; set explicitly
    # because an older site profile may have disabled it.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Expandable segments: otherwise the sampler's shapes would fragment memory too much for the training step.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # Tokenizers would start threads in every forked data worker and warn about it.
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # Log lines appear immediately; output to a file is otherwise buffered in kilobytes.
    export PYTHONUNBUFFERED=1
    # OMP_NUM_THREADS depends on the node's cores and is set in launch/slurm_rank.sh.

    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # NodeAddr is the address that SLURM itself connects to; the node's name may not be in DNS.
    MASTER_ADDR=${LATTE_FLOW_MASTER_ADDR:-$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
    # Jobs that share a node must not use the same port; the range is below the kernel's ephemeral ports.
    MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT

    setup_accelerator
    ranks_per_node=${LATTE_FLOW_RANKS:-}
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        ranks_per_node=${ranks_per_node:-1}
    fi
    # The GPUs visible to torch on this node, the first; with CUDA_VISIBLE_DEVICES these may be fewer than nvidia-smi shows.
    ranks_per_node=${ranks_per_node:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    export ranks_per_node
}

# Start a program on every GPU of every node, and wait for all ranks to end.
#   run_on_all_ranks PROGRAM [ARGUMENT ...]
# Calls on_signal when SLURM sends USR1 (#SBATCH --signal=B:USR1@SECONDS, before the time limit, or scancel --batch
# --signal=USR1). Sets $cancelled when scancel, preemption or the time limit is ending the job. Returns srun's status.
# shellcheck disable=SC2034 # read by the batch scripts
cancelled=no
run_on_all_ranks() {
    local status=0 srun_pid
    logs=${LATTE_FLOW_LOGS:-$ROOT/runs/slurm}/$SLURM_JOB_ID/restart-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$logs"
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes: $SLURM_JOB_NODELIST; logs: $logs/node-*.log"
    # --kill-on-bad-exit: when one rank fails, the others end too instead of waiting for it in a collective.
    # --cpu-bind, --gpu-bind: the ranks of a node share its cores, and each sees all its GPUs and uses number LOCAL_RANK.
    srun --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * ranks_per_node)) --ntasks-per-node="$ranks_per_node" \
        --kill-on-bad-exit=1 --cpu-bind=none --gpu-bind=none --input=none --output="$logs/node-%n.log" \
        bash "$ROOT/launch/slurm_rank.sh" "$@" &
    srun_pid=$!
    trap on_signal USR1
    # SLURM also signals the ranks, and kills everything KillWait seconds later. This script waits for their checkpoint.
    trap 'cancelled=yes' TERM
    # A trapped signal interrupts wait; the status is only valid once srun is gone.
    while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
    wait "$srun_pid" || status=$?
    trap - USR1 TERM
    return "$status"
}

# Print the end of each node's log and exit with the status of the failed launch.
fail_with_logs() {
    say "failed with status $1; the end of each node's log:"
    tail -n 15 "$logs"/node-*.log
    exit "$1"
}

# Requeue this job under its id; it starts with the same command and resumes.
requeue() {
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        fail "job $SLURM_JOB_ID could not be requeued (JobRequeue=0, or sbatch --no-requeue?); the same sbatch command resumes the run"
    fi
    say "job $SLURM_JOB_ID is requeued; SLURM delays it for cred_expire seconds (default 120)"
    exit 0
}
