#!/usr/bin/env bash
# Encode images to latents under SLURM, on all GPUs of one or more nodes; requeues itself before the time limit and resumes.
#
#   sbatch [--nodes=N] launch/encode_latents_h200.sh --source PATH --output DIR [--codec PATH] [--resolution 256] ...
#
# The arguments are those of tools/encode_latents.py, which resumes after any interruption without losing samples or encoding
# finished shards again, so a signal before the time limit simply requeues the job. For set-up, logs, environment variables and
# what to edit for a cluster, see launch/train_h200.sh.
#
##SBATCH --account=CHANGE_ME
##SBATCH --partition=CHANGE_ME
#SBATCH --job-name=latte-flow-encode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
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
[ $# -gt 0 ] || fail "missing arguments; accepted: --source PATH --output DIR, see tools/encode_latents.py --help"
use_environment
export_settings

# shellcheck disable=SC2317 # called by a trap in slurm_common.sh
on_signal() {
    say "USR1: requeueing"
    requeue
}
status=0
run_on_all_ranks tools/encode_latents.py "$@" || status=$?
[ "$status" = 0 ] || fail_with_logs "$status"
