"""Convert a checkpoint to another format: match it with its network, write to a temporary folder, read back, rename."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from latte_flow.model.backbone import BACKBONES
from latte_flow.model.configuration import LatteFlowConfig, load_network_config
from latte_flow.model.files import reading
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import check_tensor_parallel
from latte_flow.tools.command_line import check_paths
from latte_flow.tools.conversion.components import copy_components, copy_tokenizer, report_left_out
from latte_flow.tools.conversion.megatron_gpt import compare_megatron_gpt, write_megatron_gpt
from latte_flow.tools.conversion.output_folder import (
    check_not_of_a_run,
    check_output,
    make_partial_folder,
    put_in_place,
)
from latte_flow.tools.conversion.understanding import (
    compare_understanding_path,
    load_understanding_path,
    write_understanding_path,
)
from latte_flow.tools.conversion.writers import (
    write_dcp,
    write_megatron_dist,
    write_megatron_ranks,
    write_safetensors,
    write_torch_file,
    write_universal,
)
from latte_flow.training.checkpoint.formats.matching import MatchedSource
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import EMA, EXPORT_FILE, MODEL, WeightSource
from latte_flow.training.checkpoint.manifest import describe_file
from latte_flow.training.checkpoint.model_folder import TOKENIZER_FOLDER
from latte_flow.training.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from latte_flow.training.durable import sync_folder, write_synced
from latte_flow.training.errors import WRITE_FAILED, UserError

STOCK_FORMATS = tuple(dict.fromkeys(backbone.export_format for backbone in BACKBONES.values()))
FORMATS = (
    "safetensors",
    "safetensors-sharded",
    "pt",
    "dcp",
    "deepspeed-universal",
    "megatron-tp",
    "megatron-dist",
    *STOCK_FORMATS,
    "megatron-gpt",
)
UNDERSTANDING_FORMATS = (*STOCK_FORMATS, "megatron-gpt")
TENSOR_PARALLEL_FORMATS = ("megatron-tp", "megatron-gpt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]?i?B", re.IGNORECASE)


def convert(
    path: str,
    output: str,
    *,
    to: str,
    weights: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tensor_parallel: int = 1,
    tag: str | None = None,
    model_folder: str | None = None,
    vlm_path: str | None = None,
    verify: bool = False,
    force: bool = False,
) -> Path:
    """Convert a checkpoint; the arguments are those of tools/convert_checkpoint.py.

    Returns:
        The folder that was written.

    Raises:
        UserError: when an argument or the input is invalid; nothing is written then.
    """
    check_paths(path=path, output=output, model_folder=model_folder, vlm_path=vlm_path)
    target = Path(os.path.realpath(output))  # unlike resolve, also of a link to itself
    check_not_of_a_run(Path(os.path.abspath(output)))  # by its name too: checkpoints/ may be a link
    check_output(target, Path(path).resolve(), force=force)
    if not SHARD_SIZE.fullmatch(max_shard_size):
        raise UserError(f"max_shard_size: got {max_shard_size!r}; accepted: such as 5GB or 200MB")
    opened = open_checkpoint(Path(path), tag=tag, model_folder=model_folder and Path(model_folder))
    opened = dataclasses.replace(opened, vlm_path=vlm_path)
    if opened.components is not None and target.is_relative_to(opened.components.resolve()):
        raise UserError(
            f"output: {target} lies in {opened.components}, which is copied to the output; accepted: another place"
        )
    try:
        source, config = match(opened, weights=weights, dtype=dtype, to=to, tensor_parallel=tensor_parallel)
        _check_space(target.parent, source)
        partial = make_partial_folder(target)
        try:
            options = {"to": to, "dtype": dtype, "max_shard_size": max_shard_size, "ranks": tensor_parallel}
            left = write(partial, source, config, opened, **options)
            if verify:
                _verify(partial, source, config, opened, to=to, dtype=dtype, ranks=tensor_parallel)
            _finish(partial, source, opened, to)
            put_in_place(partial, target, force=force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not WRITE_FAILED.search(str(error)):
            raise
        raise UserError(f"output: {target} was not written: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    report_left_out(left)
    kinds = "weights and optimizer state" if source.training_state else f"weights ({source.kinds[0]})"
    checked = ", read back and compared" if verify else ""
    print(f"{opened.source.path} ({opened.source.format}): {kinds} of step {source.step} in {target} ({to}){checked}")
    return target


def match(
    opened: OpenedCheckpoint, *, weights: str | None, dtype: str | None, to: str, tensor_parallel: int = 1
) -> tuple[MatchedSource, LatteFlowConfig]:
    """Return the requested weights, under the names of the network that config.json describes, and that network's configuration.

    Raises:
        ValueError: when they are missing, or do not belong to that network.
    """
    source = opened.source
    if opened.components is None:
        raise UserError(f"{source.path}: no config.json beside it; accepted: --model_folder with the network's")
    config = load_network_config(opened.components)
    kinds = [kind for kind in (EMA, MODEL) if kind in source.kinds]
    if weights is not None and weights not in kinds:
        raise UserError(f"weights: {source.path} holds {' and '.join(kinds)}; accepted: {' or '.join(kinds)}")
    keeps_state = to == "deepspeed-universal" and weights is None and source.training_state is not None
    if keeps_state and dtype not in (None, "float32"):
        raise UserError(
            f"dtype: {dtype}; accepted with an optimizer's state: float32 (or --weights, without the state)"
        )
    if tensor_parallel != 1 and to not in TENSOR_PARALLEL_FORMATS:
        others = " or ".join(TENSOR_PARALLEL_FORMATS)
        raise UserError(f"tensor_parallel: {tensor_parallel}; accepted with --to {to}: 1 (with --to {others}: more)")
    if to in STOCK_FORMATS and to != config.backbone.export_format:
        kind = config.vlm_config.model_type
        raise UserError(f"to: {to}; the VLM is a {kind}; accepted: {config.backbone.export_format}")
    check_tensor_parallel(config.text_config, tensor_parallel)
    with reading(opened.components / "config.json"), torch.device("meta"):
        network = LatteFlowModel(config)
    matched = MatchedSource(source, network, weights or source.default_kind, None if dtype is None else DTYPES[dtype])
    if keeps_state:
        matched.keep_training_state()
    return matched, config


def write(
    folder: Path,
    source: MatchedSource,
    config: LatteFlowConfig,
    opened: OpenedCheckpoint,
    *,
    to: str,
    dtype: str | None,
    max_shard_size: str,
    ranks: int,
) -> list[str]:
    """Write the weights in a format, and copy the other components; return the files that were not copied."""
    assert opened.components is not None, "match refuses weights without config.json"
    if to in STOCK_FORMATS:
        options = {"dtype": None if dtype is None else DTYPES[dtype], "max_shard_size": max_shard_size}
        return write_understanding_path(folder, source, config, opened, **options)
    if to == "megatron-gpt":
        vlm = load_understanding_path(source, config, opened, None if dtype is None else DTYPES[dtype])
        write_megatron_gpt(folder, vlm, step=source.step, tensor_parallel=ranks)
        return copy_tokenizer(opened.components, folder / TOKENIZER_FOLDER)
    metadata = {"weights": source.kinds[0]} | ({} if source.step is None else {"step": str(source.step)})
    if to == "safetensors":
        write_safetensors(folder, source, max_shard_size=None, metadata=metadata)
    elif to == "safetensors-sharded":
        write_safetensors(folder, source, max_shard_size=max_shard_size, metadata=metadata)
    elif to == "pt":
        write_torch_file(folder, source)
    elif to == "dcp":
        write_dcp(folder, source)
    elif to == "megatron-dist":
        write_megatron_dist(folder, source)
    elif to == "megatron-tp":
        write_megatron_ranks(folder, source, tensor_parallel=ranks)
    else:
        write_universal(folder, source)
    return copy_components(opened.components, opened.config_file, folder)


def _check_space(folder: Path, source: WeightSource) -> None:
    """Refuse an output on a disk with too little free space."""
    while not folder.exists():
        folder = folder.parent
    kinds = len(source.kinds) if source.training_state else 1
    needed = kinds * sum(info.num_bytes for info in source.tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"output: it needs {needed / 2**30:.3g} GiB, {folder} has {free / 2**30:.3g} GiB free")


def _verify(
    folder: Path,
    source: MatchedSource,
    config: LatteFlowConfig,
    opened: OpenedCheckpoint,
    *,
    to: str,
    dtype: str | None,
    ranks: int,
) -> None:
    """Read back what was written and compare every tensor bit for bit.

    Raises:
        ValueError: names the first tensor that differs.
    """
    if to in STOCK_FORMATS:
        pairs = compare_understanding_path(folder, source, config, opened)
    elif to == "megatron-gpt":
        vlm = load_understanding_path(source, config, opened, None if dtype is None else DTYPES[dtype])
        pairs = compare_megatron_gpt(folder, vlm, tensor_parallel=ranks)
    else:
        written = open_weights(folder)
        kinds = source.kinds if source.training_state else (None,)
        pairs = (
            (f"{name} {kind or ''}", written.read(name, kind), source.read(name, kind))
            for name in source.tensors
            for kind in kinds
        )
    for name, there, expected in pairs:
        if there.dtype != expected.dtype or not torch.equal(there, expected):
            raise ValueError(f"verify: {name} reads back differently from its source; the output is not kept")


def _finish(folder: Path, source: MatchedSource, opened: OpenedCheckpoint, to: str) -> None:
    """Write export.json, with every file's size and SHA-256, and sync everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "format": to,
        "step": source.step,
        "weights": None if source.training_state else source.kinds[0],
        "source": {"format": opened.source.format, "world_size": opened.source.world_size},
        "files": {str(path.relative_to(folder)): describe_file(path) for path in files},
    }
    write_synced(folder / EXPORT_FILE, json.dumps(record, indent=1).encode())
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync_folder(path)
