"""Draw images from a checkpoint.

    python tools/sample.py CHECKPOINT --output DIR [--classes 0,1 | --prompts "a" "b"] [--num_images N] [--num_steps 40]
                           [--cfg_scale 5] [--seed 0] [--batch_size 50]

CHECKPOINT is a training output_dir, one of its step folders, or an exported model folder. Writes DIR/000000.png, 000001.png, ...
at the model's own resolution, DIR/samples.jsonl (file, class or prompt, and seed of each image) and DIR/grid.png, an overview.
Image i depends only on (--seed, i), not on the batch size; images cycle through the classes or prompts. Under torchrun or
deepspeed each of n ranks draws every n-th batch, and the result is the same.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from latte_flow.model.context import check_chat_template, tokenize_prompts
from latte_flow.model.images import grid_scale, make_grid, to_pil
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.sampling import image_seeds
from latte_flow.model.solvers import SOLVERS
from latte_flow.model.tables import look_up
from latte_flow.model.time_grids import make_timesteps
from latte_flow.tools.command_line import check_paths, check_positive, find_device, run_function
from latte_flow.training.checkpoint.opening import WEIGHTS, RemovedError, find_checkpoint, is_pipeline, load_pipeline
from latte_flow.training.distributed.collectives import agree, gather, is_first_rank
from latte_flow.training.distributed.ranks import launched_ranks
from latte_flow.training.distributed.rendezvous import INIT_METHOD
from latte_flow.training.errors import UserError, naming
from latte_flow.training.monitor.progress import hide_library_bars, progress_bar

GRID_IMAGES = 100


def sample(
    checkpoint: str,
    *,
    output: str,
    classes: str | None = None,
    prompts: list[str] | None = None,
    num_images: int | None = None,
    num_steps: int = 40,
    cfg_scale: float = 5.0,
    solver: str = "euler",
    time_grid: str = "uniform",
    shift: float | None = None,
    timesteps: str | None = None,
    align_to_experts: bool = False,
    allow_skipped_experts: bool = False,
    seed: int = 0,
    batch_size: int = 50,
    weights: Literal[*WEIGHTS] = "ema",
    vlm_path: str | None = None,
    codec_path: str | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Draw images from a checkpoint.

    Args:
        checkpoint: training output_dir, one of its step folders, or an exported model folder
        output: output folder; must not already contain samples
        classes: class indices, such as 0,1; default: every class of the model
        prompts: captions, instead of classes
        num_images: number of images; default: one per class or prompt
        num_steps: number of sampling steps
        cfg_scale: classifier-free guidance scale; 1 disables guidance
        solver: euler, heun, ab2, dpmpp or sde
        time_grid: uniform, or shifted towards the noise
        shift: of the shifted grid; default: sqrt(image tokens / 64)
        timesteps: the timesteps themselves, such as 1000,750,500,250,0, in place of a grid
        align_to_experts: move the nearest timestep onto each boundary between experts
        allow_skipped_experts: accept fewer steps than experts
        seed: random seed
        batch_size: images drawn at once
        weights: averaged (ema) or trained (model) weights
        vlm_path: folder or hub id of the VLM; default: as recorded, or beside an exported folder
        codec_path: folder or hub id of the autoencoder; default: the same
        device: cpu or cuda; default: cuda if available
        dtype: type that the network computes in

    Raises:
        UserError: when an argument or the checkpoint is invalid.
    """
    check_paths(checkpoint=checkpoint, output=output, vlm_path=vlm_path, codec_path=codec_path)
    check_positive(num_images=num_images, batch_size=batch_size, num_steps=num_steps)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: got {seed}; accepted: 0 to 2^32 - 1")
    if classes is not None and prompts is not None:
        raise UserError("classes, prompts: got both; accepted: one of them")
    folder = Path(output)
    if (folder / "samples.jsonl").exists():
        raise UserError(f"output: {folder} holds samples already; accepted: another folder")

    device = find_device(device)
    rank, world_size = launched_ranks()
    if world_size > 1:
        launched_ranks("MASTER_ADDR", "MASTER_PORT")
        # Ranks exchange only lines of text, at the end.
        dist.init_process_group("gloo", init_method=INIT_METHOD, timeout=timedelta(hours=4))
    hide_library_bars()
    path = Path(checkpoint)
    load = _load_together if world_size > 1 and not is_pipeline(path) else load_pipeline
    options = {"weights": weights, "vlm_path": vlm_path, "codec_path": codec_path}
    pipeline = load(path, dtype=getattr(torch, dtype), **options)
    pipeline.to(device)
    conditions = _conditions(classes, prompts, pipeline.config.class_names)
    sampler = {
        "num_steps": num_steps,
        "time_grid": time_grid,
        "shift": shift,
        "timesteps": _numbers(timesteps),
        "align_to_experts": align_to_experts,
        "allow_skipped_experts": allow_skipped_experts,
    }
    with naming():  # before the folder is made
        look_up(SOLVERS, solver, "solver")
        make_timesteps(pipeline.model.experts, pipeline.model.config.num_image_tokens, **sampler)
        check_chat_template(pipeline.tokenizer)
        tokenize_prompts(pipeline.tokenizer, pipeline.messages(conditions))
    total = num_images or len(conditions)
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)][rank::world_size]
    lines = []
    with progress_bar(total=sum(map(len, batches)), unit="image", desc="sampling", disable=rank != 0) as progress:
        for numbers in batches:
            batch, first = [conditions[i % len(conditions)] for i in numbers], numbers[0]
            options = {"seed": seed, "first_image": first, "cfg_scale": cfg_scale, "solver": solver}
            images = pipeline.generate(batch, **options, **sampler)
            seeds = image_seeds(seed, first, len(batch))
            for i, (image, condition) in enumerate(zip(images, batch, strict=True)):
                name = f"{first + i:06d}.png"
                to_pil(image).save(folder / name)
                key = "class" if isinstance(condition, int) else "prompt"
                lines.append({"file": name, key: condition, "seed": seeds[i]})
            progress.update(len(batch))
    if world_size > 1:
        lines = [line for part in gather(lines) for line in part]
        dist.destroy_process_group()
    if rank == 0:
        _finish(folder, sorted(lines, key=lambda line: line["file"]), len(conditions))


def _numbers(text: str | None) -> list[float] | None:
    """Return the numbers of a comma-separated list.

    Raises:
        UserError: when one is no number.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"timesteps: got {text!r}; accepted: numbers such as 1000,750,500,250,0") from error


def _load_together(path: Path, **options) -> LatteFlowPipeline:
    """Load the same checkpoint on all ranks. One that a run in progress removes meanwhile is replaced by the newer one."""
    while True:
        found, problem = _find_together(path), None
        try:
            pipeline = load_pipeline(found, verified=True, **options)
        except UserError as error:
            problem = error
        problems = [problem for problem in gather(problem) if problem is not None]
        if not problems:
            return pipeline
        if found == path or not all(isinstance(problem, RemovedError) for problem in problems):
            raise problems[0]


def _find_together(path: Path) -> Path:
    """Return the checkpoint that a path refers to, the same on all ranks: a run in progress may write a newer one meanwhile."""
    found: Path | UserError | None = None
    if is_first_rank():
        try:
            found = find_checkpoint(path)
        except UserError as error:
            found = error
    found = agree(found)
    if isinstance(found, UserError):
        raise found
    return found


def _finish(folder: Path, lines: list[dict], num_conditions: int) -> None:
    """Write the overview and, last, samples.jsonl, which marks the folder as complete."""
    shown = [np.asarray(Image.open(folder / line["file"])) for line in lines[:GRID_IMAGES]]
    columns = 10 if num_conditions % 10 == 0 else min(8, len(shown))
    to_pil(make_grid(shown, columns, scale=grid_scale(len(shown[0])))).save(folder / "grid.png")
    partial = folder / "samples.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, folder / "samples.jsonl")
    print(f"{len(lines)} images in {folder}, overview in {folder / 'grid.png'}")


def _conditions(classes: str | None, prompts: list[str] | None, class_names: list[str] | None) -> list[str | int]:
    """Return what to draw: the prompts, the requested classes, or every class."""
    if prompts is not None:
        return prompts
    if classes is None:
        if class_names is None:
            raise UserError("prompts: missing; this model has no classes to run through")
        return list(range(len(class_names)))
    try:
        chosen = [int(part) for part in classes.split(",")]
    except ValueError:
        raise UserError(f"classes: got {classes!r}; accepted: indices separated by commas, such as 0,1,2") from None
    limit = len(class_names or ())
    for index in chosen:
        if not 0 <= index < limit:
            raise UserError(f"classes: {index} is no class of this model; accepted: 0 to {limit - 1}")
    return chosen


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return run_function(sample)


if __name__ == "__main__":
    sys.exit(run())
