"""The main job with real DeepSpeed processes: ranks, ZeRO stages, resume, what a run leaves behind, and sampling from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from model.vlm import build_tiny_vlm
from tests.integration.launching import TINY_RUN, column, metrics, run, train, train_alone
from training.checkpoint import find_checkpoint, list_checkpoints, read_manifest, read_weights
from training.components import tiny_vlm_parts
from training.config import load_config
from training.data.datasets import load_image_dataset

STEPS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(runs) -> Path:
    """A run of 8 steps on one rank, with checkpoints at 4 and 8 and sample grids at 4 and 8."""
    output = runs / "one"
    arguments = [*TINY_RUN, "--max_steps", str(STEPS), "--sample.every", "4", "--sample.num_images", "20"]
    finished = train(output, *arguments, "--sample.num_steps", "8")
    assert finished.code == 0, finished.output
    return output


def test_two_ranks_train_the_same_samples_and_their_losses_agree_to_rounding(one_rank, runs):
    output = runs / "two"
    finished = train(output, *TINY_RUN, "--max_steps", str(STEPS), ranks=2)
    assert finished.code == 0, finished.output
    one, two = metrics(one_rank), metrics(output)
    assert [e["step"] for e in two] == list(range(1, STEPS + 1))
    # Before the first update the weights are the same, so the losses per group and per timestep bin agree only when both runs
    # drew the same samples, noise and timesteps.
    per_part = {name for name in one[0] if name.startswith("loss")}
    assert len(per_part) == 1 + 4 + 10
    assert {n: one[0][n] for n in per_part} == pytest.approx({n: two[0][n] for n in per_part}, rel=1e-6)
    for name in ("loss", "grad_norm", "grad_norm_group_0", "grad_norm_image_io"):
        assert column(output, name) == pytest.approx(column(one_rank, name), rel=1e-5), name


@pytest.mark.parametrize(("zero", "ranks"), [("zero1", 2), ("zero3", 2), ("zero2_offload", 1)])
def test_every_zero_stage_trains_alike(one_rank, runs, zero, ranks):
    output = runs / zero
    arguments = [*TINY_RUN, "--max_steps", str(STEPS), "--sample.every", "4", "--sample.num_images", "20"]
    finished = train(output, *arguments, "--sample.num_steps", "8", ranks=ranks, zero=zero)
    assert finished.code == 0, finished.output
    assert column(output, "loss") == pytest.approx(column(one_rank, "loss"), rel=1e-5)
    assert column(output, "grad_norm_group_2") == pytest.approx(column(one_rank, "grad_norm_group_2"), rel=1e-4)
    for which in ("model", "ema"):
        expected = read_weights(find_checkpoint(one_rank), which)
        actual = read_weights(find_checkpoint(output), which)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_stopped_run_continues_with_identical_losses_and_ends_with_identical_weights(one_rank, runs):
    output = runs / "stopped"
    # Logged every 3 steps: the mean of steps 4 to 6 spans the stop after step 4.
    arguments = [*TINY_RUN, "--logging.every", "3"]
    assert train(output, *arguments, "--max_steps", "4").code == 0
    resumed = train(output, *arguments, "--max_steps", str(STEPS))
    assert resumed.code == 0, resumed.output
    assert "resumed from" in resumed.output
    whole = runs / "whole"
    assert train(whole, *arguments, "--max_steps", str(STEPS)).code == 0

    # Step 4 was the stopped run's last, so it was logged there and the mean began again: the next one compares.
    logged = {entry["step"]: entry for entry in metrics(output)}
    assert sorted(logged) == [3, 4, 6, 8]
    assert len(metrics(output)) == 4
    for step in (3, 8):
        for name in ("loss", "grad_norm", "grad_norm_group_3"):
            assert logged[step][name] == next(e for e in metrics(whole) if e["step"] == step)[name], (step, name)
    for which in ("model", "ema"):
        expected, actual = (read_weights(find_checkpoint(folder), which) for folder in (whole, output))
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    # A sample grid in the middle swaps the averaged weights in and out: it leaves no trace in the training.
    with_grid = read_weights(find_checkpoint(one_rank), "model")
    without = read_weights(find_checkpoint(whole), "model")
    assert all(torch.equal(with_grid[name], without[name]) for name in with_grid)


def test_a_killed_run_repeats_the_steps_after_its_last_checkpoint(one_rank, runs):
    """What a run logged beyond its checkpoint is dropped and computed again, the same."""
    output = runs / "killed"
    assert train(output, *TINY_RUN, "--max_steps", "6").code == 0
    (newest,) = [path for path in list_checkpoints(output / "checkpoints") if path.name == "step_0000006"]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    finished = train(output, *TINY_RUN, "--max_steps", str(STEPS))
    assert finished.code == 0, finished.output
    assert column(output, "step") == list(range(1, STEPS + 1))
    assert column(output, "loss") == column(one_rank, "loss")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--model.variant", "blend"], id="blend"),
        pytest.param(["--model.num_groups", "1", "--model.residual_attention", "false"], id="vanilla-couple"),
        pytest.param(["--groups_per_sample", "all", "--model.context_projection", "vlm"], id="all-groups"),
        pytest.param(
            ["--precision", "bf16", "--micro_batch_size", "16", "--data.num_workers", "1"], id="bf16-accumulated"
        ),
    ],
)
def test_variants_train(runs, request, arguments):
    output = runs / request.node.callspec.id
    faster = ["--optimizer.warmup_steps", "1", "--max_steps", "12"]
    finished = train_alone(*TINY_RUN, "--output_dir", str(output), *faster, *arguments)
    assert finished.code == 0, finished.output
    losses = column(output, "loss")
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    sampled = run(["python", "tools/sample.py", str(output), "--output", str(output / "drawn"), "--num_steps", "4"])
    assert sampled.code == 0, sampled.output
    assert len(list((output / "drawn").glob("0*.png"))) == 10


def test_accumulating_micro_batches_gives_the_same_losses(one_rank, runs):
    output = runs / "accumulated"
    arguments = [*TINY_RUN, "--output_dir", str(output), "--max_steps", "4", "--micro_batch_size", "8"]
    finished = train_alone(*arguments, "--data.num_workers", "2")
    assert finished.code == 0, finished.output
    assert column(output, "loss") == pytest.approx(column(one_rank, "loss")[:4], rel=1e-5)


def test_the_frozen_vlm_is_untouched_and_in_neither_optimizer_nor_checkpoint(one_rank):
    config = load_config(one_rank / "config.yaml")
    vlm_config, _ = tiny_vlm_parts(config, load_image_dataset(config.data))
    at_start = build_tiny_vlm(vlm_config, config.vlm.tiny.seed)
    after = Qwen2VLForConditionalGeneration.from_pretrained(one_rank / "model" / "vlm")
    before_weights, after_weights = at_start.state_dict(), after.state_dict()
    assert before_weights.keys() == after_weights.keys()
    assert all(torch.equal(before_weights[name], after_weights[name]) for name in before_weights)
    tokenizer = AutoTokenizer.from_pretrained(one_rank / "model" / "tokenizer")
    question = tokenizer("Generate an image of the digit three.", return_tensors="pt")
    answers = [vlm.generate(**question, max_new_tokens=8, do_sample=False) for vlm in (at_start, after)]
    assert torch.equal(*answers)

    checkpoint = find_checkpoint(one_rank)
    model_states = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    assert all(name.split(".")[0] in ("layers", "image_io") for name in model_states["module"])
    trained = sum(shape.numel() for group in model_states["param_shapes"] for shape in group.values())
    (shard,) = checkpoint.glob("*optim_states.pt")
    state = torch.load(shard, weights_only=False)["optimizer_state_dict"]
    assert trained <= sum(len(master) for master in state["single_partition_of_fp32_groups"]) < trained + 1000


def test_an_output_dir_is_laid_out_as_documented(one_rank):
    assert {path.name for path in one_rank.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "checkpoints",
        "model",
    }
    assert [path.name for path in list_checkpoints(one_rank / "checkpoints")] == ["step_0000004", "step_0000008"]
    assert (one_rank / "checkpoints" / "latest").read_text() == "step_0000008"
    assert read_manifest(one_rank / "checkpoints" / "step_0000004")["world_size"] == 1
    grid = Image.open(one_rank / "samples" / "step_0000008.png")
    assert grid.size == (2 + 10 * 42, 2 + 2 * 42)
    first = metrics(one_rank)[0]
    assert {"step", "loss", "lr", "grad_norm", "samples_per_second"} <= first.keys()
    assert first["lr"] == pytest.approx(2e-3 / 50)


def test_tensorboard_shows_the_run(one_rank):
    events = EventAccumulator(str(one_rank / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    expected = {"train/loss", "train/grad_norm", "train/lr", "train/samples_per_second"}
    expected |= {f"loss_per_group/{group}" for group in range(4)} | {f"grad_norm_per_group/group_{g}" for g in range(4)}
    expected |= {"loss_per_timestep/0900_1000", "gate_mean/layer_01", "gate_mean/layer_07"}
    assert expected <= set(tags["scalars"])
    assert "gate_mean/layer_00" not in tags["scalars"]  # the first layer of a group has no gate
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(column(one_rank, "loss"))
    assert [image.step for image in events.Images("samples")] == [4, 8]
    (text,) = events.Tensors("config/text_summary")
    assert "global_batch_size: 32" in text.tensor_proto.string_val[0].decode()


def draw(checkpoint: Path, output: Path, *arguments: str) -> list[np.ndarray]:
    command = ["python", "tools/sample.py", str(checkpoint), "--output", str(output), "--num_steps", "4", *arguments]
    finished = run(command)
    assert finished.code == 0, finished.output
    return [np.asarray(Image.open(path)) for path in sorted(output.glob("0*.png"))]


def test_an_image_depends_on_its_seed_alone(one_rank, runs):
    together = draw(one_rank, runs / "together", "--classes", "3,1", "--num_images", "6", "--seed", "5")
    one_by_one = draw(
        one_rank, runs / "apart", "--classes", "3,1", "--num_images", "6", "--seed", "5", "--batch_size", "1"
    )
    assert [image.shape for image in together] == [(8, 8)] * 6
    for a, b in zip(together, one_by_one, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    lines = [json.loads(line) for line in (runs / "together" / "samples.jsonl").read_text().splitlines()]
    assert [line["class"] for line in lines] == [3, 1, 3, 1, 3, 1]
    assert [line["file"] for line in lines] == [f"{i:06d}.png" for i in range(6)]
    assert len({line["seed"] for line in lines}) == 6
    assert not np.array_equal(together[0], together[2])


def test_a_step_folder_and_an_exported_folder_are_checkpoints_too(one_rank, runs):
    newest = draw(one_rank, runs / "newest")
    assert len(newest) == 10
    from_step = draw(one_rank / "checkpoints" / "step_0000008", runs / "from_step")
    earlier = draw(one_rank / "checkpoints" / "step_0000004", runs / "earlier")
    assert all(np.array_equal(a, b) for a, b in zip(newest, from_step, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(newest, earlier, strict=True))
    script = "import sys; from pathlib import Path; from training.checkpoint import load_pipeline\n"
    script += "load_pipeline(Path(sys.argv[1])).save_pretrained(sys.argv[2])"
    exported = run(["python", "-c", script, str(one_rank), str(runs / "exported")])
    assert exported.code == 0, exported.output
    from_export = draw(runs / "exported", runs / "from_export")
    assert all(np.array_equal(a, b) for a, b in zip(newest, from_export, strict=True))
