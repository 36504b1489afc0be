"""What a run will cost, without running it: parameters, memory per GPU, FLOPs and time, as a table.

Nothing is estimated that can be counted. The real network is built on the meta device, where tensors have shapes and no data,
and one micro-batch goes forward and backward through it: torch's FlopCounterMode counts its operations, and hooks on the autograd
graph count the bytes kept for the backward pass.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from latte_flow.model.codecs import DCAECodec, LatentCodec, PixelCodec, apply_preset
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import Context, encode_context, tokenize_prompts, truncate_prompts
from latte_flow.model.flow_matching import flow_matching_loss
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.partition import check_tensor_parallel, partition_dim
from latte_flow.training.components import tiny_vlm_parts
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.data.context_cache import context_capacity
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.distributed.batch_layout import BatchLayout, make_batch_layout
from latte_flow.training.distributed.ranks import data_parallel_size
from latte_flow.training.errors import UserError, naming

GIB = 2**30
OPTIMIZER_BYTES = 16
"""float32 master weight, two moments of AdamW and the average: bytes a parameter, sharded over the ranks."""

BACKBONES = Path(__file__).parent / "configs" / "backbones"
BUNDLED = {
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl_2b",
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": "dc_ae_f32c32_in_1.0",
}
"""Hub id -> folder of ``BACKBONES`` that holds its config.json."""


@dataclass
class DryRun:
    """The counts. Bytes are per GPU, FLOPs per sample over all GPUs that train it; ``memory`` is item -> bytes."""

    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    layout: BatchLayout | None = None
    seconds: float = 0.0

    @property
    def total_memory(self) -> float:
        """Bytes of all items."""
        return sum(self.memory.values())


class SavedBytes:
    """Counts the bytes of distinct tensors that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, module: nn.Module):
        self.storages = {p.untyped_storage()._cdata: 0 for p in [*module.parameters(), *module.buffers()]}
        self.kept = []  # keeps the storages alive, so that no address is used twice

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            self.kept.append(storage)
        return tensor

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self.storages.values())


def configuration_source(path: str) -> str:
    """Return where the configuration of a checkpoint is read from: for the presets' own, a copy that needs no download."""
    return str(BACKBONES / BUNDLED[path]) if path in BUNDLED and not Path(path).exists() else path


def meta_vlm(path: str):
    """Build a VLM on the meta device from the config.json at a folder or hub id.

    Raises:
        UserError: when there is none.
    """
    try:
        config = AutoConfig.from_pretrained(configuration_source(path))
    except (OSError, ValueError) as error:
        raise UserError(f"vlm.path: cannot read the configuration at {path}: {error}") from error
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def meta_codec(config: TrainingConfig, image_channels: int) -> LatentCodec:
    """Build the codec on the meta device from its configuration alone."""
    if config.codec.kind == "pixel":
        return PixelCodec(image_channels, config.codec.patch)
    with naming("codec"):
        path, scaling_factor = apply_preset(config.codec.preset, config.codec.path, config.codec.scaling_factor)
    if path is None:
        raise UserError("codec.path: missing; kind dc-ae needs a folder or hub id of a diffusers AutoencoderDC")
    try:
        settings = AutoencoderDC.load_config(configuration_source(path))
    except OSError as error:
        raise UserError(f"codec.path: cannot read the configuration at {path}: {error}") from error
    with torch.device("meta"), naming("codec"):
        return DCAECodec(AutoencoderDC.from_config(settings), scaling_factor)


def count(
    config: TrainingConfig,
    vlm,
    model_config: LatteFlowConfig,
    codec: LatentCodec,
    layout: BatchLayout,
    assumed: Assumptions,
) -> DryRun:
    """Count what one rank of a run holds and does.

    Args:
        config: the run.
        vlm: the VLM on the meta device.
        model_config: the network's configuration.
        codec: the codec on the meta device.
        layout: how the batch is spread; its world size decides the shards.
        assumed: what cannot be counted.
    """
    result = DryRun(layout=layout)
    dtype, width = (torch.bfloat16, 2) if config.precision == "bf16" else (torch.float32, 4)
    with torch.device("meta"):
        model = LatteFlowModel(model_config).to(dtype)
    model.freeze_unreached_parameters()
    vlm = (model.vlm if model_config.variant == "blend" else vlm).to(dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result.parameters = {
        "generation path (layers, embeddings, head)": sum(
            p.numel() for name, p in model.named_parameters() if not name.startswith("vlm.")
        ),
        "VLM": sum(p.numel() for p in vlm.parameters()),
        "trained": trained,
        "run at one sampling step": model.activated_parameters(),
    }
    tensor_parallel = config.tensor_parallel
    if tensor_parallel > 1:
        model.replace_linears(_linears_of_one_rank(model, tensor_parallel))
        for name, linear in _linears_of_one_rank(vlm, tensor_parallel).items():  # none are left in Blend's
            vlm.set_submodule(name, linear, strict=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    micro, prompts, length = layout.micro_batch_size, assumed.num_prompts, assumed.prompt_tokens
    rows = micro * (model_config.num_groups if config.groups_per_sample == "all" else 1)
    meta = torch.device("meta")
    inputs = {
        "input_ids": torch.empty(prompts, length, dtype=torch.long, device=meta),
        "attention_mask": torch.ones(prompts, length, dtype=torch.long, device=meta),
    }
    latents = torch.empty(rows, model_config.latent_channels, *model_config.latent_size, device=meta)
    shapes = {
        "noisy_latents": latents,
        "timesteps": torch.empty(rows, device=meta),
        "context_rows": torch.empty(rows, dtype=torch.long, device=meta),
    }
    context_flops, each, capacity = 0.0, 0, 0
    context: Context | None = None
    if model_config.variant == "couple":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            context = encode_context(vlm, inputs, model_config.context_projection)
        context_flops, each = counter.get_total_flops(), context.num_bytes // prompts
        capacity = context_capacity(
            config.vlm.context_cache,
            num_prompts=prompts,
            bytes_per_prompt=each,
            budget=config.vlm.context_cache_gib * GIB,
            batch_prompts=micro,
        )
    with FlopCounterMode(display=False) as counter, SavedBytes(model) as saved:
        velocity = model(**shapes, context=context, prompt_inputs=None if context else inputs)
        loss = flow_matching_loss(velocity, latents, latents).mean()
        forward_flops, activations = counter.get_total_flops(), saved.total
        loss.backward()
    # Of all tensor-parallel ranks together; what they do not split each of them computes.
    result.flops = {
        "forward": forward_flops * tensor_parallel / micro,
        "forward and backward": counter.get_total_flops() * tensor_parallel / micro,
    }
    if isinstance(codec, DCAECodec) and config.data.dataset != "latents":
        image = torch.empty(1, codec.image_channels, config.data.resolution, config.data.resolution, device=meta)
        with FlopCounterMode(display=False) as encoder:
            codec.encode(image)
        result.flops["encoding the image"] = encoder.get_total_flops() * tensor_parallel
    if context is not None:
        when = "once a run" if capacity == prompts else "each time they are not in the cache"
        result.flops[f"context of all prompts, {when}"] = context_flops * tensor_parallel

    stage = _zero_settings(config)
    shards = layout.world_size
    held = sum(p.numel() for p in model.parameters())
    result.memory = {
        "weights": held * width / (shards if stage["stage"] == 3 else 1),
        "gradients": trained * width / (shards if stage["stage"] >= 2 else 1),
        "optimizer (master weights, moments, average)": 0 if stage["offload"] else trained * OPTIMIZER_BYTES / shards,
        "communication buckets": (stage["reduce_bucket"] * (2 if stage["overlap"] else 1)) * width,
        "activations kept for the backward pass": activations,
        "context cache": each * capacity,
    }
    if model_config.variant == "couple" and capacity != prompts:
        result.memory["frozen VLM"] = sum(p.numel() for p in vlm.parameters()) * width
    if isinstance(codec, DCAECodec):  # with latents encoded ahead it still decodes the sample grids
        result.memory["autoencoder"] = sum(p.numel() for p in codec.parameters()) * width

    per_sample = result.flops["forward and backward"] + result.flops.get("encoding the image", 0.0)
    total = per_sample * config.global_batch_size * config.max_steps
    result.seconds = total / (shards * tensor_parallel * assumed.peak_tflops * 1e12 * assumed.utilisation)
    return result


def _linears_of_one_rank(network: nn.Module, tensor_parallel: int) -> dict[str, nn.Linear]:
    """Return, by name, the parts that a tensor-parallel rank has of a network's split linears, on the meta device."""
    parts = {}
    for name, linear in network.named_modules():
        dim = partition_dim(f"{name}.weight")
        if isinstance(linear, nn.Linear) and dim is not None:
            sizes = list(linear.weight.shape)
            sizes[dim] //= tensor_parallel
            part = nn.Linear(sizes[1], sizes[0], linear.bias is not None, device="meta", dtype=linear.weight.dtype)
            parts[name] = part.requires_grad_(linear.weight.requires_grad)
    return parts


def _zero_settings(config: TrainingConfig) -> dict:
    """Read of DeepSpeed's configuration what decides memory."""
    zero = json.loads(Path(config.deepspeed).read_text()).get("zero_optimization", {})
    return {
        "stage": zero.get("stage", 0),
        "overlap": zero.get("overlap_comm", False),
        "reduce_bucket": zero.get("reduce_bucket_size", 5e8),
        "offload": bool(zero.get("offload_optimizer")),
    }


def format_table(config: TrainingConfig, result: DryRun, assumed: Assumptions) -> str:
    """Return the counts as a table that a person can read."""
    layout = result.layout
    lines = ["parameters"]
    lines += [f"  {name:<48} {value / 1e6:>12,.2f} M" for name, value in result.parameters.items()]
    stage = _zero_settings(config)["stage"]
    gpus = layout.world_size * config.tensor_parallel
    tensor = f", tensor_parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    lines += ["", f"memory per GPU (ZeRO-{stage}, {gpus} GPUs{tensor}, micro-batch {layout.micro_batch_size})"]
    lines += [f"  {name:<48} {value / GIB:>12,.3f} GiB" for name, value in result.memory.items()]
    lines += [f"  {'total':<48} {result.total_memory / GIB:>12,.3f} GiB"]
    lines += ["", "floating-point operations a sample"]
    lines += [f"  {name:<48} {value / 1e9:>12,.2f} GFLOP" for name, value in result.flops.items()]
    samples = config.max_steps * config.global_batch_size
    shares = 1 if config.groups_per_sample == "all" else config.model["num_groups"]
    whom = "GPUs" if config.tensor_parallel == 1 else f"sets of {config.tensor_parallel} GPUs"
    lines += [
        "",
        "batch",
        f"  global {layout.global_batch_size} = {layout.world_size} {whom} x micro-batch {layout.micro_batch_size} x "
        f"{layout.accumulation_steps} accumulation steps; each group sees {layout.global_batch_size // shares} samples a step",
        "",
        f"time at {assumed.utilisation:.0%} of {assumed.peak_tflops:g} TFLOP/s a GPU",
        f"  {config.max_steps:,} steps, {samples:,} samples: {result.seconds / 3600:,.2f} hours",
    ]
    return "\n".join(lines)


def dry_run(config: TrainingConfig, assumed: Assumptions) -> DryRun:
    """Build a run's parts on the meta device and count.

    A run with a tiny VLM reads its data for the prompts; others take the number and length of prompts from the assumptions.

    Raises:
        UserError: as the run itself would.
    """
    image_channels = 1 if config.data.dataset == "digits" else 3
    if config.vlm.path is None:
        images = load_image_dataset(config.data)
        image_channels = images.image_channels
        vlm_config, tokenizer = tiny_vlm_parts(config, images)
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(vlm_config)
        prompts = truncate_prompts(tokenizer, [*images.prompts, config.data.null_prompt], config.data.max_prompt_tokens)
        tokens = tokenize_prompts(tokenizer, prompts)["input_ids"]
        assumed = replace(assumed, num_prompts=tokens.shape[0], prompt_tokens=tokens.shape[1])
    else:
        vlm = meta_vlm(config.vlm.path)
    try:
        codec = meta_codec(config, image_channels)
        model_config = LatteFlowConfig(
            vlm_config=vlm.config,
            latent_channels=codec.latent_channels,
            latent_size=codec.latent_size(config.data.resolution),
            **config.model,
        )
        check_tensor_parallel(model_config.text_config, config.tensor_parallel)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    data_size = data_parallel_size(config.tensor_parallel, assumed.gpus)
    layout = make_batch_layout(config, num_groups=model_config.num_groups, world_size=data_size, rank=0)
    load_deepspeed_config(config, layout)
    try:
        return count(config, vlm, model_config, codec, layout, assumed)
    except ValueError as error:
        raise UserError(str(error)) from error
