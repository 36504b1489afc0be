"""Convert a checkpoint from any format to any other.

    python tools/convert_checkpoint.py INPUT OUTPUT --to FORMAT [--weights model|ema] [--dtype X] [--max_shard_size 5GB]
                                       [--tensor_parallel N] [--step N | --tag T] [--verify] [--force]
    python tools/convert_checkpoint.py INPUT --inspect

The format of INPUT is detected: a training output_dir or one of its step folders, DeepSpeed's ZeRO-1/2/3 shards of any number of
ranks, a DeepSpeed universal checkpoint, safetensors (one file, or shards with an index), a .pt or .bin file, a torch DCP folder,
Megatron's tensor-parallel ranks (mp_rank_XX) or dist_checkpointing. OUTPUT is a new folder with the weights and everything else
that a pipeline needs (configuration, tokenizer, the VLM where it has no path of its own). It is written under a temporary name
and renamed when complete.
"""

import ctypes
import json
import sys
from typing import Literal

from latte_flow.tools.command_line import run_function
from latte_flow.tools.conversion.convert import DTYPES, FORMATS, STOCK_FORMATS, UNDERSTANDING_FORMATS, convert
from latte_flow.tools.conversion.inspection import inspect as describe
from latte_flow.training.checkpoint.formats.source import EMA, MODEL
from latte_flow.training.checkpoint.manifest import step_name
from latte_flow.training.errors import UserError
from latte_flow.training.monitor.progress import hide_library_bars

M_MMAP_THRESHOLD = -3  # from malloc.h
LARGE = 2**20


def give_freed_memory_back() -> None:
    """Make glibc return the memory of large tensors when they are freed; by default it may keep as much as another shard."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_THRESHOLD, LARGE)


def convert_checkpoint(
    input: str,
    output: str | None = None,
    *,
    to: Literal[*FORMATS] | None = None,
    inspect: bool = False,
    tensors: bool = False,
    weights: Literal[MODEL, EMA] | None = None,
    dtype: Literal[*DTYPES] | None = None,
    max_shard_size: str | None = None,
    tensor_parallel: int = 1,
    step: int | None = None,
    tag: str | None = None,
    model_folder: str | None = None,
    vlm_path: str | None = None,
    verify: bool = False,
    force: bool = False,
) -> None:
    """Convert a checkpoint from any format to any other.

    Args:
        input: a checkpoint of any format
        output: folder to write; must not exist without --force
        to: format to write
        inspect: print what INPUT holds, and write nothing
        tensors: with --inspect: also list every tensor
        weights: default: ema if present; for deepspeed-universal: all
        dtype: type of floating-point weights; default: unchanged
        max_shard_size: for safetensors-sharded, qwen2-vl and qwen3-vl; default: 5GB
        tensor_parallel: number of ranks, for megatron-tp and megatron-gpt
        step: step of a training output_dir; default: the newest
        tag: checkpoint folder, such as step_0005000, of a training output_dir or a DeepSpeed folder
        model_folder: folder with config.json, if not beside the weights
        vlm_path: for qwen2-vl, qwen3-vl and megatron-gpt: folder or hub id of a Couple model's VLM; default: as recorded
        verify: read the output back and compare it bit for bit
        force: replace an OUTPUT written by an earlier conversion

    Raises:
        UserError: for arguments that cannot be combined, and see ``convert``.
    """
    give_freed_memory_back()
    hide_library_bars()
    if step is not None and tag is not None:
        raise UserError("step, tag: got both; accepted: one of them")
    if step is not None:
        tag = step_name(step)
    if inspect and (output or to):
        raise UserError("--inspect takes no OUTPUT and no --to: nothing is written")
    if tensors and not inspect:
        raise UserError("--tensors goes with --inspect")
    if max_shard_size is not None and to not in ("safetensors-sharded", *STOCK_FORMATS):
        raise UserError(f"--max_shard_size goes with --to safetensors-sharded or {' or '.join(STOCK_FORMATS)}")
    if vlm_path is not None and to not in UNDERSTANDING_FORMATS:
        raise UserError(f"--vlm_path goes with --to {' or '.join(UNDERSTANDING_FORMATS)}")
    if inspect:
        print(json.dumps(describe(input, tag=tag, model_folder=model_folder, tensors=tensors), indent=1))
        return
    if output is None or to is None:
        raise UserError("OUTPUT and --to are needed, or --inspect")
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    options |= {"weights": weights, "dtype": dtype, "tensor_parallel": tensor_parallel, "tag": tag}
    options |= {"model_folder": model_folder, "vlm_path": vlm_path}
    convert(input, output, to=to, verify=verify, force=force, **options)


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return run_function(convert_checkpoint)


if __name__ == "__main__":
    sys.exit(run())
