#!/usr/bin/env bash
# Draw the images for an evaluation under SLURM, on all GPUs of one or more nodes.
#
#   sbatch [--nodes=N] launch/evaluate_h200.sh CHECKPOINT OUTPUT [--num_images 50000] [--cfg_scale 5] ...
#
# CHECKPOINT is a training output_dir, one step's folder of it, or an exported model folder; the images and samples.jsonl go to
# OUTPUT; further arguments are those of tools/sample.py. Default: 50000 images, as for FID-50K, evenly over the classes.
# It ends after sampling: this repository has no evaluation tool yet. For set-up, logs, environment variables and what to edit
# for a cluster, see launch/train_h200.sh.
#
##SBATCH --account=CHANGE_ME
##SBATCH --partition=CHANGE_ME
#SBATCH --job-name=latte-flow-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
set -euo pipefail
# SLURM runs a copy of this script from its spool folder, so the repository cannot be found from the script's path.
root=${LATTE_FLOW_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if [ ! -f "$root/launch/slurm_common.sh" ]; then
    echo "error: $root is not the LaTtE-Flow repository; call sbatch in the repository's root, or set LATTE_FLOW_ROOT" >&2
    exit 2
fi
source "$root/launch/slurm_common.sh"
[ $# -ge 2 ] || fail "missing arguments; accepted: CHECKPOINT OUTPUT [arguments of tools/sample.py]"
checkpoint=$1 output=$2
shift 2
[ -e "$checkpoint" ] || fail "checkpoint: $checkpoint not found in $ROOT; accepted: a training output_dir, a step's folder, a model folder"
use_environment
export_settings

on_signal() { :; } # no signal is requested: an interrupted job starts again
status=0
run_on_all_ranks tools/sample.py "$checkpoint" --output "$output" --num_images 50000 "$@" || status=$?
[ "$status" = 0 ] || fail_with_logs "$status"
say "images: $output; not evaluated: this repository has no tools/evaluate.py yet"
