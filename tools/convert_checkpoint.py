"""Convert a checkpoint from any format to any other.

    python tools/convert_checkpoint.py INPUT OUTPUT --to FORMAT [--weights model|ema] [--dtype X] [--max_shard_size 5GB]
                                       [--tensor_parallel N] [--step N | --tag T] [--verify] [--force]
    python tools/convert_checkpoint.py INPUT --inspect

INPUT is recognised by itself: a training output_dir or one step's folder of it, DeepSpeed's ZeRO-1/2/3 shards of any number of
ranks, a DeepSpeed universal checkpoint, safetensors (one file, or shards with an index), a .pt or .bin file, a torch DCP folder,
Megatron's tensor-parallel ranks (mp_rank_XX) or dist_checkpointing. OUTPUT is a new folder: the weights, and beside them what a
pipeline needs (configuration, tokenizer, the VLM where it has no path of its own). It is written under another name and renamed
when it is complete.
"""

import ctypes
import json
import sys
from typing import Literal

from latte_flow.tools.command_line import run_function
from latte_flow.tools.conversion.convert import DTYPES, FORMATS, convert
from latte_flow.tools.conversion.inspection import inspect as describe
from latte_flow.training.checkpoint.formats.source import EMA, MODEL
from latte_flow.training.checkpoint.manifest import step_name
from latte_flow.training.errors import UserError
from latte_flow.training.monitor.progress import hide_library_bars

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 2**20


def give_freed_memory_back() -> None:
    """Have glibc give the memory of large tensors back when they are freed: it would keep up to another shard's for later."""
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
    verify: bool = False,
    force: bool = False,
) -> None:
    """Convert a checkpoint from any format to any other.

    Args:
        input: a checkpoint of any format
        output: folder to write; must not exist without --force
        to: format to write
        inspect: say what INPUT holds, and write nothing
        tensors: with --inspect: name every tensor too
        weights: default: ema where there is one; deepspeed-universal: all
        dtype: of floating-point weights; default: as they are
        max_shard_size: of safetensors-sharded and qwen2-vl; default: 5GB
        tensor_parallel: ranks of megatron-tp and megatron-gpt
        step: of a training output_dir; default: the newest
        tag: of a training output_dir or another folder of DeepSpeed's, such as step_0005000
        model_folder: where config.json is, when not beside the weights
        verify: read the output back and compare it bit for bit
        force: replace an OUTPUT that an earlier conversion has written

    Raises:
        UserError: for arguments that do not go together, and as ``convert``.
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
    if max_shard_size is not None and to not in ("safetensors-sharded", "qwen2-vl"):
        raise UserError("--max_shard_size goes with --to safetensors-sharded or qwen2-vl")
    if inspect:
        print(json.dumps(describe(input, tag=tag, model_folder=model_folder, tensors=tensors), indent=1))
        return
    if output is None or to is None:
        raise UserError("OUTPUT and --to are needed, or --inspect")
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    options |= {"weights": weights, "dtype": dtype, "tensor_parallel": tensor_parallel, "tag": tag}
    convert(input, output, to=to, model_folder=model_folder, verify=verify, force=force, **options)


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return run_function(convert_checkpoint)


if __name__ == "__main__":
    sys.exit(run())
