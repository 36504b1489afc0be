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

import argparse
import ctypes
import json
import sys

from latte_flow.tools.conversion.convert import DTYPES, FORMATS, convert
from latte_flow.tools.conversion.inspection import inspect
from latte_flow.training.checkpoint.formats.source import EMA, MODEL
from latte_flow.training.checkpoint.manifest import step_name
from latte_flow.training.errors import exit_code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/convert_checkpoint.py", description="Convert a checkpoint from any format to any other."
    )
    parser.add_argument("input", metavar="INPUT", help="a checkpoint of any format")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to write; must not exist without --force")
    parser.add_argument("--to", choices=FORMATS, help="format to write")
    parser.add_argument("--inspect", action="store_true", help="say what INPUT holds, and write nothing")
    parser.add_argument("--tensors", action="store_true", help="with --inspect: name every tensor too")
    parser.add_argument(
        "--weights", choices=(MODEL, EMA), help="default: ema where there is one; deepspeed-universal: all"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of floating-point weights; default: as they are")
    parser.add_argument("--max_shard_size", help="of safetensors-sharded and qwen2-vl (default: 5GB)")
    parser.add_argument(
        "--tensor_parallel", type=int, default=1, metavar="N", help="ranks of megatron-tp and megatron-gpt (default: 1)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of a training output_dir (default: the newest)")
    which.add_argument("--tag", help="of a training output_dir or another folder of DeepSpeed's, such as step_0005000")
    parser.add_argument("--model_folder", metavar="DIR", help="where config.json is, when not beside the weights")
    parser.add_argument("--verify", action="store_true", help="read the output back and compare it bit for bit")
    parser.add_argument("--force", action="store_true", help="replace an OUTPUT that an earlier conversion has written")
    return parser


M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 2**20


def give_freed_memory_back() -> None:
    """Have glibc give the memory of large tensors back when they are freed: it would keep up to another shard's for later."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_THRESHOLD, LARGE)


def main() -> None:
    """Parse and convert, or inspect."""
    give_freed_memory_back()
    parser = make_parser()
    arguments = vars(parser.parse_args())
    step = arguments.pop("step")
    if step is not None:
        arguments["tag"] = step_name(step)
    if arguments["inspect"] and (arguments["output"] or arguments["to"]):
        parser.error("--inspect takes no OUTPUT and no --to: nothing is written")
    if arguments["tensors"] and not arguments["inspect"]:
        parser.error("--tensors goes with --inspect")
    if arguments["max_shard_size"] is None:
        del arguments["max_shard_size"]
    elif arguments["to"] not in ("safetensors-sharded", "qwen2-vl"):
        parser.error("--max_shard_size goes with --to safetensors-sharded or qwen2-vl")
    path, output, looks, tensors = (arguments.pop(name) for name in ("input", "output", "inspect", "tensors"))
    if looks:
        options = {name: arguments[name] for name in ("tag", "model_folder")}
        print(json.dumps(inspect(path, **options, tensors=tensors), indent=1))
        return
    if output is None or arguments["to"] is None:
        parser.error("OUTPUT and --to are needed, or --inspect")
    convert(path, output, **arguments)


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
