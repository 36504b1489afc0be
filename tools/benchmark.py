"""Measure speed and memory: sampling, training, attention, data.

    python tools/benchmark.py {sample,train,attention,data} [--size paper|tiny] [--output bench.json] [--batch_size N] [--steps N]

``paper``: Qwen2-VL-2B and DC-AE built from their configurations, random weights, bfloat16, 64 tokens; nothing is downloaded.
``tiny``: the digits preset's network in float32, for a laptop. The default is paper on a GPU, otherwise tiny. ``train`` runs the
real trainer on pre-encoded latents, also under ``deepspeed`` or torchrun on many GPUs; ``--batch_size`` is then the global batch
size.

Prints a table and writes a list of rows: name, value, unit, target and floor (null where there is none), machine, versions,
shapes.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from diffusers import AutoencoderDC
from transformers import AutoConfig, AutoModelForImageTextToText

from latte_flow.model.attention import AttentionSpec, ContextKeyValues, joint_attention
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import encode_context, tokenize_prompts
from latte_flow.model.errors import ArgumentError
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.sampling import sample_latents
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.tools.command_line import check_positive, run_function
from latte_flow.training.components import BACKBONES
from latte_flow.training.configs.fields import Assumptions, DataConfig, TrainingConfig
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.latents.dataset import FORMAT, latent_columns
from latte_flow.training.data.latents.writer import LatentWriter
from latte_flow.training.data.loader import make_loader
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.distributed.collectives import agree, is_first_rank
from latte_flow.training.distributed.ranks import start_alone_without_launcher
from latte_flow.training.distributed.rendezvous import connect
from latte_flow.training.dry_run import dry_run
from latte_flow.training.monitor.launcher import launchers
from latte_flow.training.monitor.progress import hide_library_bars
from latte_flow.training.objectives.flow_matching import FlowMatchingSamples
from latte_flow.training.trainer import Trainer

CLASSES = ("tench", "goldfish", "great white shark", "tiger shark", "hammerhead", "electric ray", "stingray", "cock")
LAYER_TARGET = 1.10  # relative to transformers' plain layers
UTILISATION_TARGET = 0.45
NUM_LATENTS, SHARD = 4096, 1024


def machine() -> dict:
    """Return what the results depend on: the device, its host and the library versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = {}
    for name in ("torch", "deepspeed", "transformers", "diffusers", "flash-attn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "machine": f"{device}, {os.cpu_count()} CPU cores",
        "versions": packages | {"python": platform.python_version()},
    }


def row(
    name: str, value: float, unit: str, shapes: str, *, target: float | None = None, floor: float | None = None
) -> dict:
    """Return one result; ``target`` is the goal, ``floor`` the value that no change may fall below."""
    return {"name": name, "value": value, "unit": unit, "target": target, "floor": floor, **machine(), "shapes": shapes}


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call in seconds, including the device's work, after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        get_accelerator().synchronize()
        start = time.perf_counter()
        function()
        get_accelerator().synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def build_vlm(size: str):
    """Return a Qwen2-VL with random weights on the device, and a tokenizer whose ids are in its vocabulary."""
    tokenizer = build_tiny_tokenizer([f"Generate an image of {name}." for name in CLASSES])
    if size == "tiny":
        sizes = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = tiny_vlm_config(tokenizer, **sizes, intermediate_size=256, initializer_range=0.15)
        return build_tiny_vlm(config, seed=0).to(_device()), tokenizer
    config = AutoConfig.from_pretrained(BACKBONES / "qwen2_vl_2b")
    torch.manual_seed(0)
    with _device():
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval(), tokenizer


def build_model(vlm, size: str) -> LatteFlowModel:
    """Return a Couple model with the latent size of the paper or of the digits preset."""
    channels, side = (32, 8) if size == "paper" else (1, 8)
    config = LatteFlowConfig(vlm_config=vlm.config, latent_channels=channels, latent_size=(side, side), num_groups=4)
    with _device():
        model = LatteFlowModel.from_vlm(vlm, config)
    return model.to(device=_device(), dtype=vlm.dtype).eval()


@torch.inference_mode()
def benchmark_sample(size: str, batch_size: int, steps: int) -> list[dict]:
    """Measure the sampling loop without the codec, and one step's layers against the same number of plain transformers layers."""
    vlm, tokenizer = build_vlm(size)
    model = build_model(vlm, size)
    inputs = tokenize_prompts(tokenizer, [f"Generate an image of {name}." for name in CLASSES] + [""])
    context = encode_context(vlm, {k: v.to(_device()) for k, v in inputs.items()}, model.config.context_projection)
    rows = torch.arange(batch_size, device=_device()) % len(CLASSES)
    null = torch.tensor([len(CLASSES)], device=_device())
    noise = torch.randn(batch_size, model.config.latent_channels, *model.config.latent_size)
    config = vlm.config.text_config
    layers, tokens = model.experts.group_size, model.config.latent_size[0] * model.config.latent_size[1]
    shapes = f"batch {batch_size} doubled by CFG, {tokens} tokens, {layers} layers of {config.hidden_size}, {vlm.dtype}"

    def draw(num_steps: int):
        return sample_latents(
            model,
            noise,
            context.gather(rows),
            context.gather(null),
            num_steps=num_steps,
            cfg_scale=5.0,
            allow_skipped_experts=True,
        )

    whole = seconds(lambda: draw(steps), 3)
    key_values = model.project_context(context.gather(rows.repeat(2), model.experts.layers(0)))
    latents = noise.repeat(2, 1, 1, 1).to(_device())
    step = seconds(
        lambda: model.forward_group(latents, torch.full((2 * batch_size,), 950.0).to(_device()), key_values, 0), 10
    )

    language = vlm.model.language_model
    hidden = torch.randn(2 * batch_size, tokens, config.hidden_size, dtype=vlm.dtype, device=_device())
    positions = torch.arange(tokens, device=_device()).expand(3, 2 * batch_size, -1)
    rotary = language.rotary_emb(hidden, positions)

    def bare():
        x = hidden
        for layer in language.layers[:layers]:
            x = layer(x, attention_mask=None, position_embeddings=rotary)
            x = x[0] if isinstance(x, tuple) else x

    plain = seconds(bare, 10)
    return [
        row("sample/images_per_second", batch_size / whole, "images/s", f"{shapes}, {steps} steps"),
        row("sample/step", 1000 * step, "ms", shapes),
        row("sample/step_of_bare_layers", 1000 * plain, "ms", shapes),
        row("sample/step_over_bare_layers", step / plain, "ratio", shapes, target=LAYER_TARGET),
    ]


def write_latents(folder: Path, codec, resolution: int, count: int) -> None:
    """Write random latents of unit variance in the format of tools/encode_latents.py."""
    shape = (codec.latent_channels, *codec.latent_size(resolution))
    settings = {
        "format": FORMAT,
        "source": {"dataset": "random", "path": None, "fingerprint": "random"},
        "codec": {
            "kind": type(codec).__name__,
            "path": None,
            "fingerprint": codec.fingerprint(),
            "scaling_factor": codec.scaling_factor,
            "image_channels": codec.image_channels,
            "precision": "bf16" if codec.has_weights else None,
        },
        "resolution": resolution,
        "latent_shape": list(shape),
        "dtype": "bfloat16",
        "flips": True,
        "num_images": count,
        "shard_size": SHARD,
        "class_names": list(CLASSES),
    }
    writer, generator = LatentWriter(folder, settings), torch.Generator().manual_seed(0)
    for shard in range(writer.num_shards):
        rows = list(writer.rows(shard))
        latents = {
            name: torch.randn(len(rows), *shape, generator=generator).bfloat16() for name in latent_columns(True)
        }
        writer.write_shard(shard, latents, [i % len(CLASSES) for i in rows], rows, {})
    writer.finish(0)


def prepare_training(size: str, work: Path, batch_size: int, steps: int) -> list[str]:
    """Write the VLM, the codec and the latents, and return the command line of a run that uses them."""
    vlm, tokenizer = build_vlm(size)
    vlm.save_pretrained(work / "vlm")
    tokenizer.save_pretrained(work / "vlm")
    if size == "paper":
        torch.manual_seed(0)
        config = AutoencoderDC.load_config(BACKBONES / "dc_ae_f32c32_in_1.0")
        AutoencoderDC.from_config(config).to(torch.bfloat16).save_pretrained(work / "codec")
        codec, resolution = load_codec("dc-ae", path=str(work / "codec"), dtype=torch.bfloat16), 256
        fields = ["--config=training/configs/couple_imagenet256.yaml", "--codec.preset=null"]
        fields += [f"--codec.path={work / 'codec'}", "--data.num_workers=8"]
    else:
        codec, resolution = load_codec("pixel", image_channels=3), 8
        fields = ["--config=training/configs/digits.yaml", "--data.horizontal_flip=true"]
    write_latents(work / "latents", codec, resolution, NUM_LATENTS)
    fields += [f"--vlm.path={work / 'vlm'}", "--data.dataset=latents", f"--data.path={work / 'latents'}"]
    fields += [f"--output_dir={work / 'run'}", f"--global_batch_size={batch_size}", f"--max_steps={steps}"]
    return [*fields, "--sample.every=0"]


def benchmark_train(size: str, batch_size: int, steps: int) -> list[dict]:
    """Train some steps on pre-encoded latents with the real trainer; the targets come from the dry run."""
    start_alone_without_launcher()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    connect(timedelta(minutes=30))
    first = is_first_rank()
    work, arguments = "", []
    if first:
        work = tempfile.mkdtemp(prefix="latte-flow-benchmark-")
        arguments = prepare_training(size, Path(work), batch_size, steps)
    try:
        config = parse_config(agree(arguments))
        measured = _train(config, steps)
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(work)
        dist.destroy_process_group()
    assumed = Assumptions(gpus=measured["ranks"])
    peak, flops = assumed.peak_tflops * 1e12, measured["predicted"].flops["forward and backward"]
    rate = measured["samples_per_second"] * flops / measured["ranks"]
    on_gpu = torch.cuda.is_available()
    goal = UTILISATION_TARGET * peak * measured["ranks"] / flops if on_gpu else None
    shapes = f"global batch {batch_size}, {measured['ranks']} ranks, 64 tokens, {config.precision}, {steps} steps"
    rows = [
        row("train/samples_per_second", measured["samples_per_second"], "samples/s", shapes, target=goal),
        row("train/flops_per_second", rate / 1e12, "TFLOP/s a rank", shapes),
        row("train/loss_of_the_last_steps", measured["loss"], "1", shapes),
    ]
    if on_gpu:
        predicted = sum(measured["predicted"].memory.values()) / 2**30
        rows += [
            row(
                "train/utilisation", rate / peak, f"of {assumed.peak_tflops} TFLOP/s", shapes, target=UTILISATION_TARGET
            ),
            row("train/peak_memory", measured["peak_memory"] / 2**30, "GiB", shapes, target=predicted),
        ]
    return rows


def _train(config: TrainingConfig, steps: int) -> dict:
    trainer = Trainer(config, launchers())
    batches = iter(
        make_loader(
            trainer.objectives.samples,
            trainer.layout,
            first_step=0,
            last_step=steps,
            num_workers=config.data.num_workers,
        )
    )
    warm_up = min(10, steps // 2)
    for _ in range(warm_up):
        trainer.train_step(batches, report_gradients=False)
    trainer.objectives.report()
    get_accelerator().synchronize()
    start = time.perf_counter()
    for _ in range(steps - warm_up):
        trainer.train_step(batches, report_gradients=False)
    get_accelerator().synchronize()
    elapsed = time.perf_counter() - start
    assumed = Assumptions(gpus=dist.get_world_size(), num_prompts=len(CLASSES) + 1)
    return {
        "ranks": assumed.gpus,
        "samples_per_second": (steps - warm_up) * config.global_batch_size / elapsed,
        "peak_memory": get_accelerator().max_memory_allocated(),
        "loss": trainer.objectives.report()["loss"],
        "predicted": dry_run(config, assumed),
    }


def benchmark_attention(size: str, batch_size: int, steps: int) -> list[dict]:
    """Measure a group's attention, forward and backward, for each backend and number of image tokens."""
    heads, kv_heads, head_dim, depth = (12, 2, 128, 7) if size == "paper" else (4, 2, 32, 2)
    dtype = torch.bfloat16 if size == "paper" else torch.float32
    result = []
    for tokens in (64, 256, 1024) if size == "paper" else (64, 256):
        for backend in ("reference", "sdpa", "flash"):
            shapes = (
                f"batch {batch_size}, {tokens} tokens, {heads}/{kv_heads} heads of {head_dim}, {depth} layers, {dtype}"
            )
            try:
                spec = AttentionSpec(backend, True, "raw", "logits", head_dim, tokens)
            except ArgumentError as error:
                print(f"attention/{backend}: {error}", file=sys.stderr)
                continue

            def make(count, length):
                shape = (batch_size, count, length, head_dim)
                return torch.randn(shape, dtype=dtype, device=_device(), requires_grad=True)

            mask = torch.ones(batch_size, 32, dtype=torch.bool, device=_device())
            inputs = [(make(heads, tokens), make(kv_heads, tokens), make(kv_heads, tokens)) for _ in range(depth)]
            context = ContextKeyValues(make(kv_heads, 32), make(kv_heads, 32), mask)
            gate = torch.full((batch_size, heads), 0.5, dtype=dtype, device=_device(), requires_grad=True)

            def forward_backward():
                residual, total = None, 0.0
                for query, key, value in inputs:  # noqa: B023
                    output, residual = joint_attention(
                        *(query, key, value),
                        spec=spec,  # noqa: B023
                        context=context,  # noqa: B023
                        previous=residual,
                        gate=None if residual is None else gate,  # noqa: B023
                    )
                    total = total + output.float().sum()
                total.backward()

            name = f"attention/{backend}_{tokens}"
            result.append(row(name, 1000 * seconds(forward_backward, steps), "ms forward and backward", shapes))
    return result


def benchmark_data(size: str, batch_size: int, steps: int) -> list[dict]:
    """Measure how many training samples per second are read from a file of latents, without a model."""
    patch, resolution = (4, 32) if size == "paper" else (1, 8)  # 48 or 3 channels of 8 x 8; DC-AE's have 32
    codec = load_codec("pixel", image_channels=3, patch=patch)
    layout = BatchLayout(global_batch_size=batch_size, micro_batch_size=batch_size, world_size=1, rank=0)
    result = []
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder) / "latents"
        write_latents(latents, codec, resolution, NUM_LATENTS)
        images = load_image_dataset(DataConfig(dataset="latents", path=str(latents), resolution=resolution))
        samples = FlowMatchingSamples(
            images,
            TimestepExperts(28, 4),
            latent_shape=(codec.latent_channels, 8, 8),
            seed=0,
            condition_drop=0.1,
            null_row=len(images.prompts),
            horizontal_flip=True,
            groups_per_sample=1,
        )
        for workers in (0, 1, 4):
            batches = iter(make_loader(samples, layout, first_step=0, last_step=steps + 2, num_workers=workers))
            each = seconds(lambda: next(batches), steps)  # noqa: B023
            shapes = f"batches of {batch_size} latents of {codec.latent_channels} x 8 x 8, {workers} workers"
            result.append(row(f"data/samples_per_second_{workers}_workers", batch_size / each, "samples/s", shapes))
    return result


BENCHMARKS = {
    "sample": (benchmark_sample, {"paper": (50, 40), "tiny": (10, 8)}),
    "train": (benchmark_train, {"paper": (256, 50), "tiny": (64, 12)}),
    "attention": (benchmark_attention, {"paper": (32, 10), "tiny": (8, 3)}),
    "data": (benchmark_data, {"paper": (256, 50), "tiny": (64, 10)}),
}
"""Benchmark -> (function, size -> (default batch size, default number of steps))."""


def benchmark(
    what: Literal[*BENCHMARKS],
    *,
    size: Literal["paper", "tiny"] | None = None,
    output: Path | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
) -> None:
    """Measure speed and memory.

    Args:
        what: what to measure
        size: default: paper on a GPU, otherwise tiny
        output: file to write the rows to, as JSON
        batch_size: default: depends on size
        steps: sampling steps, training steps or repeats; default: depends on size

    Raises:
        UserError: when a number is less than 1.
    """
    check_positive(batch_size=batch_size, steps=steps)
    hide_library_bars()
    size = size or ("paper" if torch.cuda.is_available() else "tiny")
    function, defaults = BENCHMARKS[what]
    rows = function(size, batch_size or defaults[size][0], steps or defaults[size][1])
    if int(os.environ.get("RANK", 0)) != 0:
        return
    for result in rows:
        target = "" if result["target"] is None else f"   (target {result['target']:.4g})"
        print(f"{result['name']:<38} {result['value']:>12.4g} {result['unit']}{target}   [{result['shapes']}]")
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return run_function(benchmark)


if __name__ == "__main__":
    sys.exit(run())
