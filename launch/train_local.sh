#!/usr/bin/env bash
# Set up and train on this machine: one GPU, several GPUs, or only a CPU.
#
#   bash launch/train_local.sh [--config training/configs/X.yaml] [--output_dir runs/X] [--any.field value ...]
#
# Without arguments it trains the digits preset. The first start installs the environment (about 2 minutes), training takes about 4
# minutes on 2 CPU cores, and the result is an image of generated digits and the rate at which a classifier of real digits
# recognises them. Running the same command again resumes an interrupted run.
#
# LATTE_FLOW_RANKS=N   number of processes; default: one per GPU, or on a CPU one that uses all cores.
# See launch/common.sh for LATTE_FLOW_PYTHON and LATTE_FLOW_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment
setup_accelerator

output_dir=runs/digits
digits=yes
previous=
for argument in "$@"; do
    case $argument in
        --output_dir=*) output_dir=${argument#*=} ;;
        --config | --config=*) digits=no ;;
        # These print and exit; there is nothing to sample from.
        --dry_run | --dry_run=true | -h | --help) exec python training/main.py "$@" ;;
    esac
    [ "$previous" != --output_dir ] || output_dir=$argument
    previous=$argument
done

# No host file: one in a cluster image would start the run on other machines.
launcher=(deepspeed --hostfile /dev/null)
ranks=${LATTE_FLOW_RANKS:-}
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=${ranks:-1}
    # The threads of all ranks together fill the cores; more would compete for them.
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
# Without --num_gpus the launcher uses every visible GPU; with it, it ignores CUDA_VISIBLE_DEVICES.
[ -z "$ranks" ] || launcher+=(--num_gpus "$ranks")
# Two runs on one machine must not use the same port.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

say "training on ${ranks:-one per GPU} rank(s); output in $output_dir; watch it with: tensorboard --logdir $(dirname "$output_dir")"
"${launcher[@]}" --master_port "$port" training/main.py --deepspeed ds_configs/zero2.json "$@"

if [ "$digits" = no ]; then
    say "done: $output_dir; its sample grids are in $output_dir/samples"
    exit 0
fi
samples=$output_dir/final_samples
# If the run was trained further, its samples are from older weights.
[ ! "$output_dir/checkpoints/latest" -nt "$samples/samples.jsonl" ] || rm -rf "$samples"
if [ ! -f "$samples/samples.jsonl" ]; then
    python tools/sample.py "$output_dir" --output "$samples" --num_images 500 --cfg_scale 2 --batch_size 250
fi
python tools/digit_accuracy.py "$samples"
say "sample grid: $samples/grid.png"
say "TensorBoard: $(command -v tensorboard) --logdir $(dirname "$output_dir")"
