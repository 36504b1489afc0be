#!/usr/bin/env bash
# Train under SLURM on one or more nodes; requeues itself before the time limit and resumes automatically.
#
#   bash launch/setup.sh                                                   once, on a login node
#   sbatch launch/train_h200.sh [CONFIG] [--output_dir runs/X] [--any.field value ...]
#   sbatch --nodes=4 launch/train_h200.sh training/configs/X.yaml          4 nodes of 8 GPUs
#   sbatch --account=A --partition=P --time=12:00:00 launch/train_h200.sh  sbatch options go before the script
#   scancel --batch --signal=USR1 JOB                                      save a checkpoint and requeue now
#   touch OUTPUT_DIR/stop                                                  the same
#   scancel JOB                                                            end; the current step is saved if KillWait (30 s) allows
#
# Without CONFIG it trains the digits preset, a one-minute test of the cluster. Run it from the repository's root. The job's log is
# slurm-JOB.out, the nodes' logs are in runs/slurm/JOB/. Running the same command again resumes a run. See docs/slurm.md.
#
# Edit for your cluster, here or with sbatch options: account and partition, the time limit, how GPUs are requested. If the
# environment comes from modules, load them before sbatch (SLURM passes the environment on) and set LATTE_FLOW_PYTHON.
#
# LATTE_FLOW_ROOT=DIR         the repository; default: the folder where sbatch was called.
# LATTE_FLOW_PYTHON=PATH      use this interpreter; LATTE_FLOW_VENV=DIR: this environment; default: .venv of launch/setup.sh.
# LATTE_FLOW_RANKS=N          processes per node; default: one per GPU.
# More variables: launch/slurm_common.sh.
#
##SBATCH --account=CHANGE_ME
##SBATCH --partition=CHANGE_ME
#SBATCH --job-name=latte-flow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# USR1 to this script, 5 minutes before the time limit: enough for a step and a checkpoint.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# SLURM runs a copy of this script from its spool folder, so the repository cannot be found from the script's path.
root=${LATTE_FLOW_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if [ ! -f "$root/launch/slurm_common.sh" ]; then
    echo "error: $root is not the LaTtE-Flow repository; call sbatch in the repository's root, or set LATTE_FLOW_ROOT" >&2
    exit 2
fi
source "$root/launch/slurm_common.sh"

config=
arguments=("$@")
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    config=$1
    [ -f "$config" ] || fail "config: $config not found in $ROOT; accepted: a YAML file such as training/configs/digits.yaml"
    arguments=(--config "$config" "${@:2}")
fi
use_environment
export_settings

# Parse the whole command before any rank starts: an error is one line in this log, and the output folder is known.
output_dir=$(
    python - "${arguments[@]}" <<'PYTHON' | tail -n 1
import sys

from latte_flow.training.configs.parser import parse_config
from latte_flow.training.errors import exit_code

sys.exit(exit_code(lambda: print(parse_config().output_dir)))
PYTHON
)
# Earlier stop requests were meant for an earlier start; they are removed once the run has exclusive use of the folder.
LATTE_FLOW_REQUESTS_SINCE=$(date +%s)
export LATTE_FLOW_REQUESTS_SINCE

# The ranks check for the stop file after every step (training/monitor/preemption.py).
# shellcheck disable=SC2317 # called by a trap in slurm_common.sh
on_signal() {
    say "USR1: asking the ranks to save and stop"
    mkdir -p "$output_dir"
    touch "$output_dir/stop"
}
status=0
run_on_all_ranks training/main.py "${arguments[@]}" || status=$?

# Check the marker, not the exit status, which srun replaces. It names the job to requeue.
if [ "$(cat "$output_dir/requeue" 2>/dev/null)" = "$SLURM_JOB_ID" ] && [ "$cancelled" = no ]; then
    requeue
fi
if [ "$cancelled" = yes ]; then
    say "the job was cancelled; the same command resumes the run from its newest checkpoint"
    exit "$status"
fi
[ "$status" = 0 ] || fail_with_logs "$status"
say "done: $output_dir"
