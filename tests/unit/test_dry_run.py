"""The dry run counts what the real run has: against the built model, the paper's arithmetic, and measured memory."""

import ctypes
import gc
import json
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from latte_flow.model.activation_checkpointing import checkpoint_activations
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.components import build_components, build_meta_components
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import Assumptions
from latte_flow.training.configs.parser import parse_command, parse_config
from latte_flow.training.data.context_cache import FixedContextCache, PromptEncoder
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.prompts import PromptTokens
from latte_flow.training.distributed.batch_layout import make_batch_layout
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.base import freeze_unreached
from latte_flow.training.objectives.flow_matching import FlowMatching

PAPER = [
    "--config=training/configs/digits.yaml",
    "--vlm.path=training/configs/backbones/qwen2_vl_2b",
    "--codec.kind=dc-ae",
    "--codec.path=training/configs/backbones/dc_ae_f32c32_in_1.0",
    "--data.dataset=parquet",
    "--data.resolution=256",
    "--global_batch_size=2048",
    "--max_steps=240000",
    "--precision=bf16",
]


@pytest.fixture(scope="module")
def paper_run():
    return dry_run(parse_config(PAPER), Assumptions(gpus=8, prompt_tokens=16))


@pytest.mark.slow
def test_operations_at_paper_size_are_those_of_the_paper_notes(paper_run):
    """paper.md section 9: 42.4 G a forward of 7 layers, 127 G with backward, 521 G for DC-AE's encoder, 41.9 G a context pass."""
    assert paper_run.flops["forward"] == pytest.approx(42.4e9, rel=0.02)
    assert paper_run.flops["forward and backward"] == pytest.approx(127e9, rel=0.02)
    assert paper_run.flops["encoding the image"] == pytest.approx(521e9, rel=0.01)
    assert paper_run.flops["context of all prompts, once per run"] / 1001 == pytest.approx(41.9e9, rel=0.02)


def test_the_table_ends_with_the_warnings_of_the_doctor():
    config = parse_config(["--config=training/configs/digits.yaml", "--optimizer.grad_clip=0"])
    table = format_table(config, dry_run(config, Assumptions(gpus=1)), Assumptions(gpus=1))
    assert table.splitlines()[-1].startswith("warning: optimizer.grad_clip: 0 disables clipping")


@pytest.mark.slow
def test_memory_at_paper_size_follows_the_sharding_arithmetic(paper_run):
    """ZeRO-2 on 8 ranks: bf16 weights whole; float32 gradients and 16 bytes a parameter of optimizer state an eighth each."""
    trained = paper_run.parameters["trained"]
    assert paper_run.memory["weights"] == 2 * trained
    assert paper_run.memory["gradients"] == pytest.approx(4 * trained / 8)
    assert paper_run.memory["optimizer (master weights, moments, average)"] == pytest.approx(16 * trained / 8)
    # paper.md section 9: 86 KB a token of normalised hidden states
    assert paper_run.memory["context cache"] == 1001 * 16 * 28 * 1536 * 2
    hours = (127.75e9 + 521.4e9) * 2048 * 240_000 / (8 * 989.5e12 * 0.4) / 3600
    assert paper_run.seconds / 3600 == pytest.approx(hours, rel=0.01)


@pytest.mark.slow
def test_zero3_shards_the_weights_and_a_partial_cache_needs_the_vlm_beside_it(paper_run):
    stage3 = dry_run(parse_config([*PAPER, "--deepspeed=ds_configs/zero3.json"]), Assumptions(gpus=8, prompt_tokens=16))
    assert stage3.memory["weights"] == paper_run.memory["weights"] / 8
    assert stage3.memory["gradients"] == paper_run.memory["gradients"]
    assert "frozen VLM" not in paper_run.memory
    few = [*PAPER, "--vlm.context_cache=lru", "--vlm.context_cache_gib=0.5"]
    lru = dry_run(parse_config(few), Assumptions(gpus=8, prompt_tokens=16))
    assert lru.memory["frozen VLM"] == 2 * lru.parameters["VLM"]
    assert 0.49 * 2**30 < lru.memory["context cache"] <= 0.5 * 2**30
    with pytest.raises(UserError, match=r"vlm\.context_cache_gib: 0\.1 holds"):
        dry_run(parse_config([*few, "--vlm.context_cache_gib=0.1"]), Assumptions(gpus=8, prompt_tokens=16))


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_so_and_what_would_take_less(paper_run):
    config, small = parse_config(PAPER), Assumptions(gpus=8, prompt_tokens=16, gpu_gib=20)
    table = format_table(config, paper_run, small)
    for words in ("DOES NOT FIT 18 GiB, 90% of assume.gpu_gib 20", "--micro_batch_size 128", "ds_configs/zero3.json"):
        assert words in table
    remedy = dry_run(parse_config([*PAPER, "--activation_checkpointing=true"]), small)
    assert f"  {'--activation_checkpointing true':<48} {remedy.gib:12,.3f} GiB" in table
    assert "--tensor_parallel" not in table  # twice the micro-batch on as many GPUs: more
    assert "fits 18 GiB" in format_table(config, remedy, small)
    assert "fits 72 GiB, 90% of assume.gpu_gib 80" in format_table(config, paper_run, Assumptions())


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_activation_checkpointing_runs_each_layer_once_more_and_keeps_less(variant):
    plain, recomputed = (
        dry_run(parse_config([f"--model.variant={variant}", f"--activation_checkpointing={on}"]), Assumptions(gpus=1))
        for on in ("false", "true")
    )
    assert recomputed.flops["forward"] == plain.flops["forward"]
    again = recomputed.flops["forward and backward"] - plain.flops["forward and backward"]
    assert 0.7 * plain.flops["forward"] < again <= plain.flops["forward"]  # embeddings and head run once
    assert recomputed.seconds > plain.seconds
    kept = "activations kept for the backward pass"
    layer = recomputed.memory["activations of the layer that is run again"]
    assert 0 < layer < plain.memory[kept] / 4
    assert recomputed.memory[kept] + layer < plain.memory[kept] / 2


def test_what_a_recomputed_layer_is_given_is_counted(tmp_path):
    """The maps of residual attention pass from layer to layer; autograd does not see that checkpointing keeps them."""
    arguments = ["--activation_checkpointing=true", "--global_batch_size=64", "--model.num_groups=1"]
    kept = [
        dry_run(parse_config([*arguments, f"--model.residual_attention={on}"]), Assumptions(gpus=1)).memory[
            "activations kept for the backward pass"
        ]
        for on in ("true", "false")
    ]
    heads, layers, maps = 4, 8, 64 * 64 * 64 * 4  # 64 samples, 64 x 64 in float32
    assert kept[0] - kept[1] == pytest.approx((layers - 1) * heads * maps, rel=0.05)


@pytest.mark.parametrize("overlap", [True, False])
def test_buckets_left_to_deepspeed_are_counted_as_it_makes_them(tmp_path, overlap):
    section = {"stage": 2, "overlap_comm": overlap, "reduce_bucket_size": "auto", "contiguous_gradients": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    config = parse_config([f"--deepspeed={tmp_path / 'ds.json'}"])
    result = dry_run(config, Assumptions(gpus=1))
    assert result.memory["communication buckets"] == 500_000_000 * 4 * (2 if overlap else 1)
    assert "ZeRO-2" in format_table(config, result, Assumptions(gpus=1))


def test_an_offloaded_optimizer_is_host_memory():
    name = "optimizer (master weights, moments, average)"
    here = dry_run(parse_config([]), Assumptions(gpus=1))
    offloaded = dry_run(parse_config(["--deepspeed=ds_configs/zero2_offload.json"]), Assumptions(gpus=1))
    assert offloaded.memory[name] == 0
    assert offloaded.host == here.host | {"offloaded optimizer": here.memory[name]}


def build(config, tmp_path):
    images = load_image_dataset(config.data)
    vlm, tokenizer, _, model_config, _ = build_components(config, images, tmp_path / "none")
    torch.manual_seed(0)
    return images, vlm, tokenizer, LatteFlowModel.from_vlm(vlm, model_config)


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_parameters_are_those_of_the_built_model(tmp_path, variant):
    config = parse_config(["--model.variant", variant])
    counted = dry_run(config, Assumptions(gpus=1)).parameters
    _, vlm, _, model = build(config, tmp_path)
    assert isinstance(vlm, Qwen2VLForConditionalGeneration)
    freeze_unreached(model, [FlowMatching])
    assert counted["VLM"] == sum(p.numel() for p in vlm.parameters())
    assert counted["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    path = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vlm."))
    assert counted["generation path (layers, embeddings, head)"] == path
    held = sum(p.nbytes for network in (model, vlm) for p in network.parameters())
    assert dry_run(config, Assumptions(gpus=1)).host["building the network"] == held


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_activations_agree_with_the_memory_a_real_forward_takes(tmp_path, checkpointing):
    config = parse_config(["--global_batch_size", "1024", "--activation_checkpointing", checkpointing])
    predicted = dry_run(config, Assumptions(gpus=1)).memory["activations kept for the backward pass"]
    images, vlm, tokenizer, model = build(config, tmp_path)
    checkpoint_activations(model, config.activation_checkpointing)
    context = FixedContextCache(
        PromptEncoder(vlm, PromptTokens(tokenizer, images.prompts, null_prompt=""), "generation")
    ).context
    batch = torch.randn(1024, 1, 8, 8), torch.rand(1024) * 1000
    rows = torch.zeros(1024, dtype=torch.long)
    model(batch[0][:8], batch[1][:8], context=context, context_rows=rows[:8])  # libraries take their own memory once
    gc.collect()
    process, libc = psutil.Process(), ctypes.CDLL(None)
    libc.malloc_trim(0)  # what is freed goes back to the system
    before = process.memory_info().rss
    velocity = model(*batch, context=context, context_rows=rows)
    libc.malloc_trim(0)
    measured = process.memory_info().rss - before
    assert velocity.requires_grad
    assert 0.95 * predicted < measured < 1.1 * predicted


@pytest.mark.slow
def test_the_table_names_every_part_and_the_batch_arithmetic(paper_run):
    config = parse_config(PAPER)
    table = format_table(config, paper_run, Assumptions(gpus=8))
    for text in (
        "1,582.86 M",
        "ZeRO-2, 8 GPUs, micro-batch 256",
        "each group sees 512 samples per step",
        "240,000 steps",
        "optimizer (master weights, moments, average)",
        "context of all prompts, once per run",
    ):
        assert text in table


def test_assumptions_come_from_the_command_line_and_are_checked():
    command = parse_command(["--dry_run", "--assume.gpus", "16"])
    assert command.dry_run
    assert command.assume.gpus == 16
    with pytest.raises(UserError, match=r"assume\.gpus"):
        parse_command(["--dry_run", "--assume.gpus", "0"])


def test_what_the_run_refuses_is_refused_before_it_is_counted():
    autoencoder = "training/configs/backbones/dc_ae_f32c32_in_1.0"
    for arguments, message in (
        (["--codec.kind=dc-ae", f"--codec.path={autoencoder}"], r"codec: takes 3 image channels, data\.dataset digits"),
        (["--vlm.path=training/configs"], r"vlm\.path: training/configs has no config\.json"),
        (["--vlm.path", autoencoder], r"vlm\.path: (cannot load|.* accepted: qwen2_vl)"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run(parse_config(arguments), Assumptions(gpus=1))


@pytest.mark.parametrize("preset", sorted(Path("training/configs").glob("*imagenet*.yaml")), ids=lambda path: path.stem)
def test_presets_describe_a_network_and_a_batch_for_8_gpus(preset):
    config = parse_config(["--config", str(preset)])
    vlm, codec, network, _ = build_meta_components(config)  # by their hub ids, with no download
    assert {p.device.type for p in [*vlm.parameters(), *codec.parameters()]} == {"meta"}
    side = config.data.resolution // 32
    layout = make_batch_layout(config, world_size=8, rank=0)
    FlowMatching.check(config, network, layout)
    load_deepspeed_config(config, layout)
    assert network.num_image_tokens == side**2
    assert f"--config {preset}" in preset.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(Path("training/configs").glob("*imagenet*.yaml")), ids=lambda path: path.stem)
def test_presets_fit_80_gib_and_cost_what_their_headers_say(preset):
    result = dry_run(parse_config(["--config", str(preset)]), Assumptions(gpus=8))
    assert result.gib <= 0.9 * 80
    text = " ".join(line.lstrip("# ") for line in preset.read_text().splitlines() if line.startswith("#"))
    counted = (
        f"{result.seconds / 3600:.1f} hours, {result.gib:.0f} GiB per GPU plus transient buffers. "
        f"{result.parameters['trained'] / 1e9:.2f} B trained parameters, "
        f"{result.parameters['run at one sampling step'] / 1e6:,.0f} M run at one sampling step, "
        f"{result.flops['forward and backward'] / 1e9:.0f} GFLOP per training sample"
    )
    assert counted in text
