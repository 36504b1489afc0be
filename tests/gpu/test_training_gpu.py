"""The main job on a CUDA device: the losses of the CPU, stopping and resuming, sampling, the autoencoder."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte_flow.model.codecs import load_codec
from tests.integration.launching import column, environment, free_port, run
from tests.tiny_models import save_tiny_dc_ae

pytestmark = pytest.mark.gpu

SHORT = ["--global_batch_size", "64", "--max_steps", "12", "--logging.every", "1", "--checkpoint.every", "6"]
SHORT += ["--sample.every", "6", "--sample.num_images", "10", "--sample.num_steps", "8"]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def train(output_dir, *arguments: str, device: str = "cuda", ranks: int = 1):
    settings = environment()
    if device == "cuda":
        del settings["DS_ACCELERATOR"]
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "training/main.py"]
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


@two_gpus
@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_tensor_parallel_ranks_train_what_one_trains(tmp_path, variant):
    """Under NCCL; then one rank resumes from what two have written."""
    fields = ["--precision", "bf16", "--model.variant", variant]
    train(tmp_path / "whole", *fields)
    train(tmp_path / "parts", *fields, "--tensor_parallel", "2", "--max_steps", "6", ranks=2)
    assert "instead of 2" in train(tmp_path / "parts", *fields)
    whole, parts = (column(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-2)


@two_gpus
def test_a_rank_that_is_stopped_under_nccl_ends_the_run(tmp_path):
    """The other rank waits in a collective on the device, which no signal interrupts."""
    settings = environment()
    del settings["DS_ACCELERATOR"]
    fields = [*SHORT, "--max_steps", "100000", "--health.hang_minutes", "0.5", "--output_dir", str(tmp_path / "run")]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "training/main.py", *fields]

    def stop_the_second_rank() -> bool:
        if (tmp_path / "run" / "metrics.jsonl").exists() and not stopped:
            ours = [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in _content(p / "cmdline")]
            ranks = [p for p in ours if b"\0RANK=1\0" in _content(p / "environ")]
            for path in ranks:
                os.kill(int(path.name), signal.SIGSTOP)
            stopped.extend(ranks)
        return False

    stopped: list = []
    finished = run(command, env=settings, kill_when=stop_the_second_rank, timeout=300)
    assert finished.code != 0
    assert "rank 1 does not answer: its process is stopped" in finished.output


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


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
