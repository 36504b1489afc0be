"""The main job on a CUDA device: the losses of the CPU, stopping and resuming, sampling, the autoencoder."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.autoencoder import load_codec
from tests.integration.launching import column, environment, free_port, run
from tests.tiny_models import save_tiny_dc_ae

pytestmark = pytest.mark.gpu

SHORT = ["--global_batch_size", "64", "--max_steps", "12", "--logging.every", "1", "--checkpoint.every", "6"]
SHORT += ["--sample.every", "6", "--sample.num_images", "10", "--sample.num_steps", "8"]


def train(output_dir, *arguments: str, device: str = "cuda"):
    settings = environment()
    if device == "cuda":
        del settings["DS_ACCELERATOR"]
    command = ["deepspeed", "--num_gpus", "1", "--master_port", str(free_port()), "training/main.py"]
    finished = run([*command, *SHORT, "--output_dir", str(output_dir), *arguments], env=settings)
    assert finished.code == 0, finished.output
    return finished.output


def test_losses_and_grids_are_those_of_the_cpu(tmp_path):
    for device in ("cpu", "cuda"):
        train(tmp_path / device, device=device)
    losses = [column(tmp_path / device, "loss") for device in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    grids = [np.asarray(Image.open(tmp_path / d / "samples" / "step_0000006.png")).astype(int) for d in ("cpu", "cuda")]
    assert np.abs(grids[0] - grids[1]).mean() < 1


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_bf16_learns_and_a_resumed_run_goes_on(tmp_path, variant):
    fields = ["--precision", "bf16", "--model.variant", variant]
    train(tmp_path / "whole", *fields)
    train(tmp_path / "parts", *fields, "--max_steps", "6")
    assert "resumed from" in train(tmp_path / "parts", *fields)
    whole, parts = (column(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-2)
    assert np.mean(whole[-3:]) < np.mean(whole[:3])


def test_another_zero_stage_and_asynchronous_saves_go_on(tmp_path):
    """The moments, the average and AdamW's counter are put together and cut anew on the device."""
    fields = ["--precision", "bf16", "--checkpoint.asynchronous", "true"]
    train(tmp_path / "whole", *fields)
    train(tmp_path / "parts", *fields, "--max_steps", "6")
    output = train(tmp_path / "parts", *fields, "--deepspeed", "ds_configs/zero3.json")
    assert "resumed from" in output
    whole, parts = (column(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-2)
    assert all(seconds > 0 for seconds in column(tmp_path / "parts", "rank_seconds_min"))


def test_the_autoencoder_gives_the_latents_of_the_cpu(tmp_path):
    codec = load_codec("dc-ae", path=str(save_tiny_dc_ae(tmp_path / "dc_ae")))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = codec.encode(images)
    torch.testing.assert_close(codec.to("cuda").encode(images.cuda()).cpu(), expected, rtol=1e-2, atol=1e-3)


def test_the_benchmark_of_training_runs_at_the_papers_size(tmp_path):
    settings = environment()
    del settings["DS_ACCELERATOR"]
    command = ["python", "tools/benchmark.py", "train", "--output", str(tmp_path / "bench.json"), "--steps", "12"]
    finished = run(command, env=settings)
    assert finished.code == 0, finished.output
    assert "train/peak_memory" in finished.output
