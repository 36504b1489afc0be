"""The main job with real DeepSpeed processes.

Promised here: any number of ranks, micro-batches and any ZeRO stage train the same samples with the same noise at the same
timesteps, with losses and gradient norms that agree to rounding; every variant trains; the average of the weights is the one that
training/optimizer.py writes down; sample grids and the frozen VLM leave no trace in each other's or the model's weights.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from latte_flow.model.tiny_vlm import build_tiny_vlm
from latte_flow.training.checkpoint.formats.zero_shards import ZeroShards
from latte_flow.training.checkpoint.io import safe_unpickling
from latte_flow.training.checkpoint.opening import load_pipeline, read_weights
from latte_flow.training.components import tiny_vlm_parts
from latte_flow.training.configs.saved import load_config
from latte_flow.training.data.datasets import load_image_dataset
from tests.integration.launching import ROOT, column, metrics

STEPS = 8


def recorded(run) -> dict[tuple[int, int, int], dict]:
    """Return what the hook record_batches saw on all ranks: (step, global sample index, group) -> that row of the batch."""
    rows = {}
    for file in sorted(run.hook_dir.glob("rank_*.pt")):
        for batch in torch.load(file, weights_only=False):
            images = batch.pop("images")[batch.pop("image_rows")]
            step, indices, groups = batch.pop("step"), batch.pop("sample_indices"), batch.pop("groups")
            for row, key in enumerate(zip(indices.tolist(), groups.tolist(), strict=True)):
                assert (step, *key) not in rows, "no sample is trained twice"
                rows[(step, *key)] = {"images": images[row]} | {name: values[row] for name, values in batch.items()}
    return rows


def assert_same_batches(one: dict, other: dict) -> None:
    """The same samples, bit for bit, and losses that agree to rounding."""
    assert one.keys() == other.keys()
    for key, row in one.items():
        for name in ("images", "noise", "timesteps", "context_rows"):
            assert torch.equal(row[name], other[key][name]), (key, name)
        torch.testing.assert_close(row["losses"], other[key]["losses"], rtol=1e-5, atol=1e-6)


def assert_losses_and_norms_agree(run, reference, *, rel: float = 1e-5) -> None:
    """Every logged loss, per group and timestep bin too, and every gradient norm agrees at every step."""
    ours, theirs = metrics(run.output_dir), metrics(reference.output_dir)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for mine, expected in zip(ours, theirs, strict=True):
        names = {name for name in expected if name.startswith(("loss", "grad_norm"))}
        assert names == {name for name in mine if name.startswith(("loss", "grad_norm"))}
        # Norms of a few 1e-5 in the first steps: their rounding is that of gradients around 1.
        assert {n: mine[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=rel, abs=1e-6)


def assert_weights_equal(run, reference, step: int) -> None:
    """The trained and the averaged weights are the same bits."""
    for which in ("model", "ema"):
        ours, theirs = (read_weights(r.checkpoint(step), which) for r in (run, reference))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Ranks, micro-batches, ZeRO


def test_one_and_two_ranks_train_the_same_samples_noise_and_timesteps(one_rank, two_ranks):
    one, two = recorded(one_rank), recorded(two_ranks)
    assert sorted(index for _, index, _ in one) == list(range(STEPS * 32))
    assert_same_batches(one, two)


def test_losses_and_gradient_norms_of_one_and_two_ranks_agree_at_every_step(one_rank, two_ranks):
    assert len(metrics(one_rank.output_dir)) == STEPS
    assert_losses_and_norms_agree(two_ranks, one_rank)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulated_micro_batches_train_the_same(command, one_rank, ranks):
    run = command.train(
        ranks=ranks, micro_batch_size=4, data__num_workers=1, hooks=("record_batches",), sample__every=0
    )
    assert_same_batches(recorded(one_rank), recorded(run))
    assert_losses_and_norms_agree(run, one_rank)


def first_gradient(run) -> torch.Tensor:
    """Return the gradient of the first step, times 1 - beta1: AdamW's first moment, over all parameters."""
    with safe_unpickling(run.checkpoint(1)):
        shards = ZeroShards(run.checkpoint(1))
        return torch.cat([shards.read(name, "exp_avg").flatten().double() for name in sorted(shards.shapes)])


def test_bfloat16_gradients_are_accumulated_in_float32(command):
    """Over 32 micro-batches. In bfloat16, as DeepSpeed would by default, the sum is off by 0.5 % instead of 0.2 %."""
    fields = {"max_steps": 1, "sample__every": 0, "global_batch_size": 128, "micro_batch_size": 4}
    exact, ours = (first_gradient(command.train(precision=p, **fields)) for p in ("fp32", "bf16"))
    assert float((ours - exact).norm() / exact.norm()) < 3e-3


@pytest.mark.parametrize(("zero", "ranks"), [("zero1", 2), ("zero3", 2), ("zero2_offload", 1)])
def test_every_zero_stage_trains_the_same(command, two_ranks, zero, ranks):
    run = command.train(ranks=ranks, zero=zero)
    assert_losses_and_norms_agree(run, two_ranks)
    for which in ("model", "ema"):
        ours, theirs = (read_weights(r.checkpoint(STEPS), which) for r in (run, two_ranks))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_zero3_that_releases_every_parameter_trains_and_resumes_the_same(command, tmp_path, variant):
    """At these sizes ds_configs/zero3.json keeps all weights gathered; threshold 0 gathers and releases each at every use."""
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    fields = {
        "model__variant": variant,
        "ranks": 2,
        "sample__every": 8,
        "sample__num_images": 4,
        "sample__num_steps": 4,
    }
    reference = command.train(**fields)
    half = command.train(deepspeed=tmp_path / "zero3.json", **(fields | {"max_steps": 4, "sample__every": 0}))
    run = command.train(deepspeed=tmp_path / "zero3.json", output_dir=half.output_dir, **fields)
    assert "resumed from" in run.finished.output
    assert_losses_and_norms_agree(run, reference, rel=1e-4)
    grids = [
        np.asarray(Image.open(r.output_dir / "samples" / "step_0000008.png")).astype(int) for r in (run, reference)
    ]
    assert np.abs(grids[0] - grids[1]).max() <= 1
    # Activation checkpointing gathers and releases each layer once more, and changes no number.
    fields |= {"activation_checkpointing": True, "sample__every": 0}
    assert_losses_and_norms_agree(command.train(deepspeed=tmp_path / "zero3.json", **fields), run, rel=0)


# Variants


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        pytest.param(2, {"precision": "bf16", "micro_batch_size": 8}, id="bf16"),
        pytest.param(1, {"groups_per_sample": "all", "model__context_projection": "vlm"}, id="all-groups"),
        pytest.param(2, {"model__variant": "blend"}, id="blend"),
        pytest.param(1, {"model__num_groups": 1, "model__residual_attention": "false"}, id="vanilla"),
        pytest.param(
            1,
            {"model__variant": "blend", "model__num_groups": 1, "model__residual_attention": "false"},
            id="vanilla-blend",
        ),
    ],
)
def test_every_variant_learns_and_draws(command, ranks, fields):
    run = command.train(ranks=ranks, max_steps=12, sample__every=0, checkpoint__every=12, **fields)
    losses = column(run.output_dir, "loss")
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert column(run.output_dir, "skipped_steps") == [0] * 12
    drawn = command.sample(run.output_dir)
    assert len(list(drawn.output_dir.glob("0*.png"))) == 10


def test_all_groups_train_on_every_sample_at_a_timestep_of_their_own(command):
    run = command.train(groups_per_sample="all", max_steps=1, sample__every=0, hooks=("record_batches",))
    rows = recorded(run)
    assert sorted(rows) == [(1, index, group) for index in range(32) for group in range(4)]
    assert all(torch.equal(rows[1, i, 0]["noise"], rows[1, i, g]["noise"]) for i in range(32) for g in range(4))
    assert len({float(row["timesteps"]) for row in rows.values()}) == len(rows)


# The averaged weights


def test_the_saved_average_is_the_closed_form_of_the_saved_weights(command):
    """The closed form of training/optimizer.py in float64, from the weights saved after each step, with both kinds of decay."""
    decay_limit = 0.3
    run = command.train(
        ranks=2,
        max_steps=5,
        sample__every=2,
        checkpoint__every=1,
        checkpoint__keep_last=0,
        optimizer__ema_decay=decay_limit,
    )
    average = None
    for n in range(1, 6):
        weights = {k: v.double() for k, v in read_weights(run.checkpoint(n), "model").items()}
        decay = min(decay_limit, (1 + n) / (10 + n))
        average = weights if average is None else {k: decay * average[k] + (1 - decay) * weights[k] for k in weights}
        saved = read_weights(run.checkpoint(n), "ema")
        for name, expected in average.items():
            torch.testing.assert_close(saved[name].double(), expected, rtol=1e-6, atol=1e-8, msg=f"{name} at step {n}")
    assert any(not torch.equal(saved[name], weights[name].float()) for name in saved)


def test_sample_grids_leave_no_trace_in_the_training(command, two_ranks):
    without = command.train(ranks=2, sample__every=0)
    assert not (without.output_dir / "samples").exists()
    for name in ("loss", "grad_norm", "grad_norm_group_0", "loss_group_3"):
        assert column(without.output_dir, name) == column(two_ranks.output_dir, name)
    assert_weights_equal(without, two_ranks, STEPS)


# The frozen VLM


def test_the_context_is_the_same_however_much_of_it_is_kept(command):
    """The last two keep fewer prompts than there are; the sample grids ask for prompts, too."""
    fields = {"micro_batch_size": 4, "sample__num_images": 4, "global_batch_size": 8}
    kept = command.train(vlm__context_cache="all", **fields)
    some = {"vlm__context_cache": "lru", "vlm__context_cache_gib": 1.5e-4}
    for limits, said in (({"vlm__context_cache": "none"}, "none of 11"), (some, "most recently used of 11")):
        run = command.train(**fields, **limits)
        assert said in run.finished.output
        for name in ("loss", "grad_norm", "grad_norm_group_0", "loss_group_3"):
            assert column(run.output_dir, name) == column(kept.output_dir, name)
        assert_weights_equal(run, kept, STEPS)
        grids = [(r.output_dir / "samples" / "step_0000008.png").read_bytes() for r in (run, kept)]
        assert grids[0] == grids[1]


def test_long_prompts_are_cut_in_training_and_sampling_alike(command):
    run = command.train(data__max_prompt_tokens=5, max_steps=2, sample__num_images=10, sample__every=2)
    assert "data.max_prompt_tokens: 10 of 11 prompts are truncated to 5 tokens" in run.finished.output
    pipeline = load_pipeline(run.output_dir)
    assert all(len(pipeline.tokenizer(message)["input_ids"]) <= 5 for message in pipeline.messages(range(10)))
    settings = ["--num_images", "10", "--seed", "0", "--cfg_scale", "2", "--num_steps", "8"]
    drawn = command.sample(run.output_dir, *settings).output_dir / "grid.png"
    grids = [np.asarray(Image.open(f)).astype(int) for f in (drawn, run.output_dir / "samples" / "step_0000002.png")]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.fixture(scope="module")
def vlm_folder(one_rank, tmp_path_factory):
    """A folder that transformers wrote: the VLM, its tokenizer and its image processor, as a download would be."""
    folder, saved = tmp_path_factory.mktemp("vlm") / "Qwen2-VL-tiny", one_rank.output_dir / "model"
    Qwen2VLForConditionalGeneration.from_pretrained(saved / "vlm").save_pretrained(folder)
    AutoTokenizer.from_pretrained(saved / "tokenizer").save_pretrained(folder)
    AutoImageProcessor.from_pretrained(saved / "tokenizer").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_a_vlm_of_a_folder_trains_as_the_one_that_is_built(command, one_rank, vlm_folder, variant, tmp_path):
    run = command.train(vlm__path=vlm_folder, model__variant=variant, output_dir=tmp_path / "run")
    if variant == "couple":
        assert column(run.output_dir, "loss") == column(one_rank.output_dir, "loss")
    assert not (run.output_dir / "model" / "vlm").exists()  # it is referred to
    pipeline = load_pipeline(run.output_dir)
    assert Path(pipeline.config.vlm_path) == vlm_folder
    answers = [
        p.ask(Image.new("RGB", (56, 56), "red"), "zero or one?") for p in (pipeline, load_pipeline(one_rank.output_dir))
    ]
    assert (answers[0] == answers[1]) == (variant == "couple")  # Blend has trained it
    assert len(list(command.sample(run.output_dir).output_dir.glob("0*.png"))) == 10


def test_another_vlm_under_the_same_path_is_refused(command, vlm_folder, tmp_path):
    folder = shutil.copytree(vlm_folder, tmp_path / "vlm")
    run = command.train(vlm__path=folder, max_steps=2, sample__every=0, checkpoint__every=2)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    again = command.train(vlm__path=folder, max_steps=3, sample__every=0, output_dir=run.output_dir, code=None)
    assert again.finished.code == 2
    assert (
        f"error: vlm.path: {folder} is not the VLM that {run.output_dir / 'model'} was trained with"
        in again.finished.output
    )
    drawn = command.sample(run.output_dir, code=None)
    assert drawn.finished.code == 2
    assert "is not the VLM that this model was trained with" in drawn.finished.output


def test_the_frozen_vlm_has_the_same_bits_before_and_after_training(one_rank):
    before, after = (torch.load(one_rank.hook_dir / f"vlm_{when}.pt") for when in ("before", "after"))
    saved = Qwen2VLForConditionalGeneration.from_pretrained(one_rank.output_dir / "model" / "vlm").state_dict()
    config = load_config(one_rank.output_dir / "config.yaml")
    vlm_config, _ = tiny_vlm_parts(config, load_image_dataset(config.data))
    built = build_tiny_vlm(vlm_config, config.vlm.tiny.seed).state_dict()
    for weights in (after, saved, built):
        assert weights.keys() == before.keys()
        assert [name for name in before if not torch.equal(before[name], weights[name])] == []


def test_the_frozen_vlm_is_in_neither_the_optimizer_nor_the_checkpoint(one_rank, two_ranks):
    for run, ranks in ((one_rank, 1), (two_ranks, 2)):
        checkpoint = run.checkpoint(STEPS)
        states = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
        assert {name.split(".")[0] for name in states["module"]} == {"layers", "image_io"}
        trained = {name: shape.numel() for group in states["param_shapes"] for name, shape in group.items()}
        assert trained.keys() == read_weights(checkpoint, "model").keys()
        shards = [
            torch.load(file, weights_only=False)["optimizer_state_dict"]
            for file in checkpoint.glob("*_optim_states.pt")
        ]
        assert len(shards) == ranks
        masters = sum(len(master) for shard in shards for master in shard["single_partition_of_fp32_groups"])
        assert masters == sum(trained.values())  # the padding between shards is not saved
        for shard in shards:
            for state in shard["base_optimizer_state"]["state"].values():
                assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "ema"}
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size < 4 * 5 * sum(trained.values()) * 1.1  # weights, master weights, two moments, average, in float32


def test_the_vlm_of_an_output_dir_answers_as_transformers_own(one_rank):
    pipeline = load_pipeline(one_rank.output_dir)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(one_rank.output_dir / "model" / "vlm")
    tokenizer = AutoTokenizer.from_pretrained(one_rank.output_dir / "model" / "tokenizer")
    question = [{"role": "user", "content": "Generate an image of the digit three."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answers = [vlm.generate(**inputs, max_new_tokens=12, do_sample=False) for vlm in (pipeline.backbone, theirs)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > inputs["input_ids"].shape[1]
    with torch.no_grad():
        assert torch.equal(*(vlm(**inputs).logits for vlm in (pipeline.backbone, theirs)))
