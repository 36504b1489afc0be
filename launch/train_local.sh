#!/usr/bin/env bash
# Set up and train on this machine: one GPU, many GPUs, or only a CPU.
#
#   bash launch/train_local.sh [--config training/configs/X.yaml] [--output_dir runs/X] [--any.field value ...]
#
# Without arguments: the digits preset. The first start installs the environment (about 2 minutes), training takes about 4
# minutes on 2 CPU cores, and it ends with a picture of generated digits and the rate at which a classifier of real digits
# recognises them. The same command again resumes an interrupted run.
#
# LATTE_FLOW_RANKS=N   number of processes; default: one per GPU, on a CPU one that uses all cores.
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
    esac
    [ "$previous" != --output_dir ] || output_dir=$argument
    previous=$argument
done

if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=${LATTE_FLOW_RANKS:-1}
    # Threads of all ranks together fill the cores; more would fight over them.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
else
    ranks=${LATTE_FLOW_RANKS:-$(nvidia-smi -L | grep -c GPU)}
fi
# Two runs on one machine must not meet at the same port.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

say "training on $ranks rank(s); output in $output_dir; watch it with: tensorboard --logdir $(dirname "$output_dir")"
deepspeed --num_gpus "$ranks" --master_port "$port" training/main.py --deepspeed ds_configs/zero2.json "$@"

if [ "$digits" = no ]; then
    say "done: $output_dir; its sample grids are in $output_dir/samples"
    exit 0
fi
samples=$output_dir/final_samples
if [ ! -f "$samples/samples.jsonl" ]; then
    python tools/sample.py "$output_dir" --output "$samples" --num_images 500 --cfg_scale 2 --batch_size 250
fi
python tools/digit_accuracy.py "$samples"
say "sample grid: $samples/grid.png"
say "TensorBoard: $(command -v tensorboard) --logdir $(dirname "$output_dir")"
