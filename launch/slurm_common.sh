# shellcheck shell=bash
# Sourced by the SLURM batch scripts, in the repository: environment, communication settings, one launcher per node, stopping and
# requeueing.
#
# LATTE_FLOW_LOGS=DIR        where the nodes' logs go; default: runs/slurm in the repository.
# LATTE_FLOW_MASTER_ADDR=H   address under which the nodes reach the job's first node; default: what SLURM knows it by.
# MASTER_PORT=N              its port; default: derived from the job's number.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this script runs inside a SLURM job; start it with: sbatch launch/$(basename "$0")"

# Put the project's environment on PATH; install nothing, see launch/setup.sh.
use_environment() {
    if [ -n "${LATTE_FLOW_PYTHON:-}" ]; then
        [ -x "$LATTE_FLOW_PYTHON" ] || fail "LATTE_FLOW_PYTHON: $LATTE_FLOW_PYTHON is no executable on $(hostname)"
        PATH="$(dirname "$LATTE_FLOW_PYTHON"):$PATH"
        export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local venv=${LATTE_FLOW_VENV:-$ROOT/.venv}
    [ -f "$venv/latte_flow.stamp" ] ||
        fail "$venv is not set up; run once on a login node: bash launch/setup.sh (or set LATTE_FLOW_PYTHON to a Python of yours)"
    PATH="$venv/bin:$PATH"
    export PATH
}

# Settings of all ranks. A value that the cluster or the user has set already stays.
export_settings() {
    # Warnings name the network interface or node that failed; INFO would write megabytes on every start.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # InfiniBand retries up to about 17 s instead of 1 s, so that a link that comes back does not end a job of many nodes.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # A collective in which one rank failed ends the other ranks with an error after its timeout. Torch's default; said here
    # because an older site profile may have switched it off.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Segments that grow: the sampler's shapes during training would otherwise leave memory too fragmented for the step.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # Tokenizers would start threads in every forked data worker and warn about it.
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # Log lines appear when they are written; a file is buffered by kilobytes otherwise.
    export PYTHONUNBUFFERED=1
    # OMP_NUM_THREADS depends on the node's cores: launch/slurm_node.sh.

    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # NodeAddr is what SLURM itself connects to; the node's name need not be known to the name service.
    MASTER_ADDR=${LATTE_FLOW_MASTER_ADDR:-$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
    # Two jobs that share a node must not meet at one port; below the range that the kernel hands out.
    MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
}

# Start one launcher per node, which runs a program on every GPU, and wait for the end of all.
#   run_on_all_ranks PROGRAM [ARGUMENT ...]
# Calls on_signal when SLURM sends USR1 (#SBATCH --signal=B:USR1@SECONDS, before the time limit, or scancel --batch
# --signal=USR1). Sets $cancelled when the job is being ended by scancel, preemption or its time limit. Returns srun's status.
# shellcheck disable=SC2034 # read by the batch scripts
cancelled=no
run_on_all_ranks() {
    local status=0 srun_pid
    logs=${LATTE_FLOW_LOGS:-$ROOT/runs/slurm}/$SLURM_JOB_ID/restart-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$logs"
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes: $SLURM_JOB_NODELIST; logs: $logs/node-*.log"
    # --kill-on-bad-exit: when one node fails, the others end too instead of waiting for it in a collective.
    # --cpu-bind=none: the one task of a node starts all its ranks, which share all the node's cores.
    # --cpus-per-task: since SLURM 22.05 srun does not take it over from sbatch.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --input=none --output="$logs/node-%n.log" \
        bash "$ROOT/launch/slurm_node.sh" "$@" &
    srun_pid=$!
    trap on_signal USR1
    # SLURM signals the ranks as well, and kills everything KillWait seconds later. This script waits for their checkpoint.
    trap 'cancelled=yes' TERM
    # A trapped signal interrupts wait; only when srun is gone does its status count.
    while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
    wait "$srun_pid" || status=$?
    trap - USR1 TERM
    return "$status"
}

# End this script with a failed launch's status and the end of each node's log.
fail_with_logs() {
    say "failed with status $1; the end of each node's log:"
    tail -n 15 "$logs"/node-*.log
    exit "$1"
}

# Queue this job again under its number; it starts with the same command and resumes.
requeue() {
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        fail "job $SLURM_JOB_ID could not be requeued (JobRequeue=0, or sbatch --no-requeue?); the same sbatch command resumes the run"
    fi
    say "job $SLURM_JOB_ID is queued again; SLURM holds it back for cred_expire seconds (default 120)"
    exit 0
}
