"""docs/train.md: its commands, from a folder of images to a running job, on a real SLURM at tiny size."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte_flow.model.tiny_vlm import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from tests.integration.launching import environment, free_port
from tests.slurm.conftest import ROOT
from tests.tiny_models import save_tiny_dc_ae

TIMEOUT = 200


def documented_commands() -> list[str]:
    """The commands of the numbered steps, and the one that draws."""
    text = (ROOT / "docs" / "train.md").read_text().split("## Before you submit")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """A folder with what the reader has: images, and checkpoints of both backbones, tiny and random."""
    folder, pixels = tmp_path_factory.mktemp("machine"), np.random.default_rng(0)
    for wnid in ("n01440764", "n01443537"):
        (folder / "data" / "imagenet" / "train" / wnid).mkdir(parents=True)
        for i in range(12):
            picture = pixels.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "data" / "imagenet" / "train" / wnid / f"{i}.JPEG")
    save_tiny_dc_ae(folder / "models" / "dc_ae")
    tokenizer = build_tiny_tokenizer(["Generate an image of tench."])
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    vlm = build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=32, initializer_range=0.15), seed=0)
    for part in (vlm, tokenizer, build_tiny_image_processor(vlm.config)):
        part.save_pretrained(folder / "models" / "vlm")
    return folder


def at_tiny_size(command: str, folder: Path) -> list[str]:
    """Change paths and sizes of a documented command, and nothing else."""
    command = command.replace("/data/", f"{folder}/data/").replace("--resolution 256", "--resolution 32")
    command = re.sub(r"(?<= )(runs|samples)\b", rf"{folder}/\1", command)
    if "encode_latents" in command:
        command += f" --codec {folder}/models/dc_ae --shard_size 8 --batch_size 4 --num_workers 0"
    if "train_h200" in command:
        command += f" --vlm.path {folder}/models/vlm --codec.preset null --codec.path {folder}/models/dc_ae"
        command += f" --output_dir {folder}/runs/couple_imagenet256 --data.resolution 32 --data.num_workers 0"
        command += " --global_batch_size 8 --max_steps 4 --optimizer.warmup_steps 2 --logging.every 1"
        command += " --sample.num_images 4 --sample.num_steps 4 --sample.every 4"
    if "evaluate" in command:
        command += " --num_images 6 --num_steps 4"
    return shlex.split(command)


def run(words: list[str], folder: Path) -> str:
    """Run a command that ends by itself, with this Python in place of .venv's; return what it prints."""
    words = [sys.executable if word == ".venv/bin/python" else word for word in words]
    settings = environment() | {"LATTE_FLOW_PYTHON": sys.executable, "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def run_job(cluster, words: list[str], folder: Path, ranks_per_node: int = 1) -> None:
    """Submit a job and wait until it has succeeded."""
    log = folder / f"{Path(words[1]).stem}.log"
    job = cluster.run(
        *("sbatch", "--parsable", f"--output={log}", *words[1:]),
        cwd=ROOT,
        **{name: value for name, value in environment().items() if os.environ.get(name) != value},
        LATTE_FLOW_PYTHON=sys.executable,
        LATTE_FLOW_RANKS=str(ranks_per_node),
        LATTE_FLOW_LOGS=str(folder / "logs"),
        HF_DATASETS_CACHE=str(folder / "cache"),
    ).split(";")[0]
    state = cluster.wait_for_end(job, TIMEOUT)
    logs = [log, *(folder / "logs" / job).glob("*/*.log")]
    assert state == "COMPLETED", "\n".join(path.read_text() for path in logs)


def read_page(words: list[str], page: str) -> str:
    """Start TensorBoard, read one page of it, and end it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("tensorboard")), *words[1:], "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                content = urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10).read().decode()
                if json.loads(content) or time.monotonic() > deadline:  # it reads the runs after it has opened its port
                    return content
            except urllib.error.URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        server.terminate()
        server.wait()


def test_from_a_folder_of_images_to_a_running_job_and_its_pictures(cluster, machine):
    setup, encode, cost, train, watch, draw = documented_commands()
    assert "the environment is ready" in run(shlex.split(setup), machine)

    run_job(cluster, at_tiny_size(encode, machine), machine)
    assert json.loads((machine / "data" / "imagenet-latents" / "manifest.json").read_text())["num_images"] == 24

    table = run(at_tiny_size(cost, machine), machine)
    assert "1,582.86 M" in table
    assert "5.51 hours" in table
    document = (ROOT / "docs" / "train.md").read_text()
    assert "1.58 B trained parameters" in document
    assert "5.5 hours" in document

    run_job(cluster, at_tiny_size(train, machine), machine)
    output = machine / "runs" / "couple_imagenet256"
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert (output / "samples" / "step_0000004.png").is_file()

    page = read_page(at_tiny_size(watch, machine), "data/plugin/scalars/tags")
    assert "train/loss" in json.loads(page)["couple_imagenet256/tensorboard"]

    run_job(cluster, at_tiny_size(draw, machine), machine, ranks_per_node=2)
    pictures = sorted((machine / "samples" / "couple_imagenet256").glob("0*.png"))
    assert [np.asarray(Image.open(path)).shape for path in pictures] == [(32, 32, 3)] * 6
