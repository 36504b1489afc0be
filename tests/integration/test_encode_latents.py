"""Encoding ahead, as real processes: kills leave no trace, ranks leave no trace, and training from it is training from images."""

import hashlib
import json
import os
import random
import re
import runpy
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from latte_flow.model.codecs import load_codec
from latte_flow.model.images import to_uint8
from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.errors import UserError
from tests.emoji import EMOJI, needs_emoji, write_emoji
from tests.integration import launching
from tests.integration.launching import ROOT, SERVER, environment, free_port, metrics
from tests.tiny_models import save_tiny_dc_ae

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

IMAGES = 400
RESOLUTION = 32


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    if not EMOJI.is_file():
        pytest.skip(needs_emoji.kwargs["reason"])
    return write_emoji(tmp_path_factory.mktemp("emoji") / "train.parquet", IMAGES)


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory):
    return save_tiny_dc_ae(tmp_path_factory.mktemp("models") / "dc_ae")


def arguments(source, output, codec, **changed):
    return {
        "source": str(source),
        "output": str(output),
        "codec": str(codec),
        "resolution": RESOLUTION,
        "batch_size": 8,
        "shard_size": 16,
        "num_workers": 0,
        "device": "cpu",
        "wait_minutes": 0.01,
    } | changed


def _child(cache: str, function, *args) -> None:
    # tqdm's lock is a semaphore that forked processes share: one killed while holding it would stop all that follow.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    function(*args)


def start(function, *args):
    """Start a process that calls a function."""
    process = SERVER.Process(target=_child, args=(str(datasets.config.HF_DATASETS_CACHE), function, *args))
    process.start()
    return process


def encode(kwargs: dict) -> None:
    encode_latents(**kwargs)


def contents(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def complete_shards(folder: Path) -> dict[str, int]:
    """Return when each shard that has its small manifest was written."""
    return {f.name: f.with_suffix(".arrow").stat().st_mtime_ns for f in folder.glob("data-*.json")}


# --- kills -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pixel", "dc_ae"])
def test_five_kills_at_random_points_leave_no_trace(emoji, dc_ae, tmp_path, codec):
    codec = "pixel" if codec == "pixel" else dc_ae
    encode_latents(**arguments(emoji, tmp_path / "whole", codec))
    draws, stopped_at, output = random.Random(0), [], tmp_path / "killed"
    for _ in range(5):
        kept = complete_shards(output)
        process = start(encode, arguments(emoji, output, codec))
        # In the midst of some shard; by progress and not by the clock, so that a busy machine does not decide where.
        wanted = len(kept) + draws.randrange(4)
        while len(complete_shards(output)) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "killed too late to show anything"
        assert kept.items() <= complete_shards(output).items(), "a finished shard was encoded again"
        stopped_at.append(len(complete_shards(output)))
    assert 0 < stopped_at[-1] < IMAGES // 16, stopped_at
    kept = complete_shards(output)
    encode_latents(**arguments(emoji, output, codec))
    assert kept.items() <= complete_shards(output).items()
    assert contents(output) == contents(tmp_path / "whole")


def _encode_and_die(kwargs: dict, step: int) -> None:
    """Encode, and be killed just before the given one of the calls that make a file durable or give it its name."""
    count, real = 0, {name: getattr(os, name) for name in ("fsync", "replace")}

    def counting(name):
        def call(*args):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real[name](*args)

        return call

    for name in real:
        setattr(os, name, counting(name))
    encode_latents(**kwargs)


def test_a_kill_before_any_step_of_writing_leaves_no_trace(tmp_path):
    small = {"resolution": 8, "shard_size": 700}  # 2 shards
    encode_latents(**arguments("digits", tmp_path / "whole", "pixel", **small))
    for step in range(100):
        output = tmp_path / f"killed-{step}"
        process = start(_encode_and_die, arguments("digits", output, "pixel", **small), step)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        encode_latents(**arguments("digits", output, "pixel", **small))
        assert contents(output) == contents(tmp_path / "whole"), step
    # Settings, two files a shard, dataset_info, state and manifest: 8 files, each with fsync, replace, fsync.
    assert step == 3 * (1 + 2 * 2 + 3)


# --- ranks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pixel", "dc_ae"])
def test_one_rank_and_three_ranks_write_the_same_bytes(emoji, dc_ae, tmp_path, codec):
    codec = "pixel" if codec == "pixel" else dc_ae
    encode_latents(**arguments(emoji, tmp_path / "one", codec))
    ranks = [
        start(encode, arguments(emoji, tmp_path / "three", codec, rank=rank, world_size=3, wait_minutes=1))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_workers_and_batch_size_leave_no_trace_with_the_pixel_codec(emoji, tmp_path):
    encode_latents(**arguments(emoji, tmp_path / "a", "pixel"))
    encode_latents(**arguments(emoji, tmp_path / "b", "pixel", num_workers=2, batch_size=5))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_missing_rank_is_an_error_and_the_same_command_completes(tmp_path):
    few = {"resolution": 8, "shard_size": 200}
    with pytest.raises(UserError, match=r"wait_minutes: 3 shards of other ranks are missing"):
        encode_latents(**arguments("digits", tmp_path / "a", "pixel", rank=0, world_size=2, **few))
    encode_latents(**arguments("digits", tmp_path / "a", "pixel", **few))
    encode_latents(**arguments("digits", tmp_path / "b", "pixel", **few))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- what is stored --------------------------------------------------------------------------------------------------------


def stored(folder: Path, column: str, shape) -> torch.Tensor:
    """Read a column through ``datasets``, as docs/data.md tells."""
    table = datasets.load_from_disk(str(folder)).with_format("numpy", columns=[column], dtype=np.int16)
    return torch.stack([torch.from_numpy(row[column]).view(torch.bfloat16) for row in table]).view(-1, *shape)


def test_decoding_the_pixel_codecs_latents_gives_the_pictures(emoji, tmp_path):
    output = tmp_path / "latents"
    encode_latents(**arguments(emoji, output, "pixel", patch=2))
    images = load_image_dataset(DataConfig(dataset="parquet", path=str(emoji), resolution=RESOLUTION))
    codec = load_codec("pixel", image_channels=3, patch=2)
    pixels = torch.stack([images[i][0] for i in range(IMAGES)])
    latents, flipped = (stored(output, name, (12, 16, 16)) for name in ("latent", "latent_flipped"))
    assert np.array_equal(to_uint8(codec.decode(latents)), to_uint8(pixels))
    assert np.array_equal(to_uint8(codec.decode(flipped)), to_uint8(pixels.flip(-1)))
    table = datasets.load_from_disk(str(output))
    assert table["text"][:] == [images.captions[row] for row in images.prompt_rows]
    assert table["index"][:] == list(range(IMAGES))


def test_dc_ae_latents_are_the_codecs_and_the_manifest_describes_them(emoji, dc_ae, tmp_path):
    output = tmp_path / "latents"
    encode_latents(**arguments(emoji, output, dc_ae, precision="fp32"))
    images = load_image_dataset(DataConfig(dataset="parquet", path=str(emoji), resolution=RESOLUTION))
    codec = load_codec("dc-ae", path=dc_ae)
    pixels = torch.stack([images[i][0] for i in range(16)])
    latents, flipped = (stored(output, name, (8, 8, 8)) for name in ("latent", "latent_flipped"))
    torch.testing.assert_close(latents[:16].float(), codec.encode(pixels), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(flipped[:16].float(), codec.encode(pixels.flip(-1)), rtol=2**-8, atol=1e-5)

    manifest = json.loads((output / "manifest.json").read_text())
    values = torch.cat([latents, flipped]).double()
    assert manifest["statistics"]["mean"] == pytest.approx(float(values.mean()), abs=1e-12)
    assert manifest["statistics"]["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-12)
    assert manifest["statistics"]["channel_std"] == pytest.approx(values.std(dim=(0, 2, 3), correction=0).tolist())
    assert manifest["codec"]["fingerprint"] == codec.fingerprint()
    assert manifest["codec"]["scaling_factor"] == codec.scaling_factor == 0.4
    assert (manifest["num_images"], manifest["num_broken"], manifest["resolution"]) == (IMAGES, 0, RESOLUTION)
    for shard in manifest["shards"]:
        file = output / shard["file"]
        assert shard["bytes"] == file.stat().st_size
        assert shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_latents_far_from_unit_variance_are_flagged(emoji, tmp_path, capsys):
    unscaled = save_tiny_dc_ae(tmp_path / "dc_ae", scaling_factor=40.0)
    encode_latents(**arguments(emoji, tmp_path / "latents", unscaled))
    (warning,) = json.loads((tmp_path / "latents" / "manifest.json").read_text())["warnings"]
    assert re.search(r"standard deviation is .* outside 0\.5 to 2", warning)
    assert warning in capsys.readouterr().err


def test_broken_images_are_listed_and_keep_their_rows(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(20)]}, features)
    encoded = table.cast_column("image", datasets.Image(decode=False)).to_dict()
    for index in (3, 4, 9):
        encoded["image"][index]["bytes"] = b"no picture"
    datasets.Dataset.from_dict(encoded, features).to_parquet(tmp_path / "data.parquet")
    few = {"resolution": 8, "shard_size": 5}
    with pytest.raises(UserError, match=r"max_broken_fraction: 1 broken images"):
        encode_latents(**arguments(tmp_path / "data.parquet", tmp_path / "latents", "pixel", **few))
    accepting = few | {"max_broken_fraction": 0.2}
    encode_latents(**arguments(tmp_path / "data.parquet", tmp_path / "latents", "pixel", **accepting))
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert [entry["index"] for entry in manifest["broken"]] == [3, 4, 9]
    assert "UnidentifiedImageError" in manifest["broken"][0]["reason"]
    rows = datasets.load_from_disk(str(tmp_path / "latents"))
    assert rows["index"][:] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 10, *range(10, 20)]
    assert rows["label"][:] == [i % 2 for i in rows["index"]]

    from_images, from_latents = (
        load_image_dataset(DataConfig(dataset=kind, path=str(path), resolution=8, max_broken_fraction=0.2))
        for kind, path in (("parquet", tmp_path / "data.parquet"), ("latents", tmp_path / "latents"))
    )
    assert from_latents.prompts == from_images.prompts
    for index in range(20):
        for flip in (False, True):
            image, latent = (d.sample(index, flip=flip) for d in (from_images, from_latents))
            assert image["row"] == latent["row"]
            assert torch.equal(image["image"].bfloat16(), latent["latent"])


def test_labels_may_be_renamed_without_encoding_again(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["n01440764", "n01443537"])}
    )
    pictures = [np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(6)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 3}, features)
    table.to_parquet(tmp_path / "data.parquet")
    encode_latents(**arguments(tmp_path / "data.parquet", tmp_path / "latents", "pixel", resolution=8))
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    config = {"horizontal_flip": False, "prompt_template": "a {}"}
    assert load_image_dataset(latents_config(tmp_path / "latents", **config)).prompts == ["a n01440764", "a n01443537"]
    named = load_image_dataset(latents_config(tmp_path / "latents", class_names=str(tmp_path / "names.txt"), **config))
    assert named.prompts == ["a tench", "a goldfish"]
    assert named.class_names == ["tench", "goldfish"]


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "latents"
    encode_latents(**arguments("digits", folder, "pixel", resolution=8, flip=False, shard_size=512))
    return folder


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"patch": 2}, "codec.fingerprint"), ({"flip": True}, "flips"), ({"shard_size": 100}, "shard_size")],
)
def test_an_output_of_other_settings_is_refused(digits, changed, named):
    before = contents(digits)
    with pytest.raises(UserError, match=rf"output: .* holds latents of another .*{re.escape(named)}"):
        encode_latents(
            **arguments("digits", digits, "pixel", **{"resolution": 8, "flip": False, "shard_size": 512} | changed)
        )
    assert contents(digits) == before


def test_an_output_of_another_source_or_of_something_else_is_refused(emoji, digits, tmp_path):
    with pytest.raises(UserError, match=r"output: .* holds latents of another"):
        encode_latents(**arguments(emoji, digits, "pixel", resolution=8, flip=False, shard_size=512))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output: .* exists and is not a folder of tools/encode_latents\.py"):
        encode_latents(**arguments("digits", tmp_path, "pixel", resolution=8))


def test_the_same_command_on_a_complete_folder_changes_nothing(digits, capsys):
    before = {f.name: f.stat().st_mtime_ns for f in digits.iterdir()}
    encode_latents(**arguments("digits", digits, "pixel", resolution=8, flip=False, shard_size=512))
    assert "is complete" in capsys.readouterr().out
    assert {f.name: f.stat().st_mtime_ns for f in digits.iterdir()} == before


def latents_config(path, **fields):
    return DataConfig(**{"dataset": "latents", "path": str(path), "resolution": 8, "horizontal_flip": False} | fields)


def test_training_refuses_latents_that_do_not_fit(digits, tmp_path):
    with pytest.raises(UserError, match=r"data\.resolution: 16, but .* was encoded at 8"):
        load_image_dataset(latents_config(digits, resolution=16))
    with pytest.raises(UserError, match=r"data\.horizontal_flip: true, but .* without mirrored images"):
        load_image_dataset(latents_config(digits, horizontal_flip=True))
    with pytest.raises(UserError, match=r"codec: .* was encoded by another codec"):
        load_image_dataset(latents_config(digits)).check_codec(load_codec("pixel", image_channels=1, patch=2))
    with pytest.raises(UserError, match=r"wait_minutes"):
        encode_latents(**arguments("digits", tmp_path / "part", "pixel", resolution=8, shard_size=900, world_size=2))
    with pytest.raises(UserError, match=r"data\.path: .*manifest\.json is missing: encoding is incomplete"):
        load_image_dataset(latents_config(tmp_path / "part"))
    encode_latents(**arguments("digits", tmp_path / "part", "pixel", resolution=8, shard_size=900))
    next((tmp_path / "part").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"data\.path: .* has 3 bytes"):
        load_image_dataset(latents_config(tmp_path / "part"))


# --- docs/data.md ----------------------------------------------------------------------------------------------------------


def documented_commands() -> list[str]:
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


def test_the_documented_commands_run_at_tiny_size(dc_ae, tmp_path):
    """Each command as it stands there, but for the paths, the codec, the sizes and the number of processes."""
    generator = np.random.default_rng(0)
    for wnid in ("n01440764", "n01443537"):
        folder = tmp_path / "imagenet" / "train" / wnid
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")

    results = {}
    for number, command in enumerate(documented_commands()):
        words = command.replace("/data/", f"{tmp_path}/").replace("--resolution 256", f"--resolution {RESOLUTION}")
        if "tools/encode_latents.py" in command:
            output = tmp_path / f"output-{number}"
            words = re.sub(r"--output \S+", f"--output {output}", words)
            words += f" --codec {dc_ae} --shard_size 5 --batch_size 2 --num_workers 0"
            words = words.replace(
                "torchrun --nproc-per-node 8", f"torchrun --nproc-per-node 2 --master-port {free_port()}"
            )
            words = words.replace("deepspeed ", f"deepspeed --num_gpus 2 --master_port {free_port()} ")
            run(words, cwd=ROOT, cache=tmp_path / "cache")
            results[command] = output
            if not (tmp_path / "imagenet-latents").exists():
                (tmp_path / "imagenet-latents").symlink_to(output)
        elif "training/main.py" in command:
            fields = words.split("training/main.py")[1]
            fields += f" --data.resolution {RESOLUTION} --codec.preset null --codec.path {dc_ae} --vlm.path null"
            assert len(train(tmp_path / "run", tmp_path / "cache", fields)) == 3
        else:
            run(words, cwd=tmp_path, cache=tmp_path / "cache")
    assert len(results) == 4
    first, by_torchrun, by_deepspeed, named = map(contents, results.values())
    assert first == by_torchrun == by_deepspeed != named
    manifests = [json.loads((output / "manifest.json").read_text()) for output in results.values()]
    assert manifests[0]["class_names"] == ["n01440764", "n01443537"]
    assert manifests[3]["class_names"] == ["tench", "goldfish"]
    assert manifests[0]["num_images"] == 24


# --- training --------------------------------------------------------------------------------------------------------------


def _program(script: str, arguments: list[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run(command: str, *, cwd: Path, cache: Path, **variables: str) -> None:
    """Run a command line of the documentation, in the environment of the tests."""
    words = shlex.split(command)
    if words[0] == "python" and words[1].endswith(".py"):
        process = start(_program, words[1], words[2:], variables)
        process.join(timeout=300)
        assert process.exitcode == 0, command
        return
    words[0] = {"python": sys.executable}.get(words[0], str(Path(sys.executable).with_name(words[0])))
    finished = launching.run(words, cwd=cwd, env=environment() | {"HF_DATASETS_CACHE": str(cache)} | variables)
    assert finished.code == 0, finished.output


TINY = (
    "--max_steps 3 --global_batch_size 8 --logging.every 1 --sample.every 0 --data.num_workers 0 --precision fp32 "
    "--vlm.tiny.hidden_size 32 --vlm.tiny.num_hidden_layers 4 --vlm.tiny.num_attention_heads 2 "
    "--vlm.tiny.num_key_value_heads 1 --vlm.tiny.intermediate_size 32 --model.num_groups 2"
)


def train(output: Path, cache: Path, arguments: str) -> list[dict]:
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    run(f"python training/main.py --output_dir {output} {TINY} {arguments}", cwd=ROOT, cache=cache, **alone)
    return metrics(output)


def losses(logged: list[dict]) -> list[dict]:
    assert len(logged) == 3
    return [{k: v for k, v in row.items() if k.startswith(("loss", "grad_norm"))} for row in logged]


def test_training_from_pixel_latents_is_training_from_images(digits, tmp_path):
    from_images = train(tmp_path / "images", tmp_path, "")
    from_latents = train(tmp_path / "latents", tmp_path, f"--data.dataset latents --data.path {digits}")
    assert losses(from_latents) == losses(from_images)


def test_training_from_dc_ae_latents_is_training_from_images_up_to_rounding(emoji, dc_ae, tmp_path):
    encode_latents(**arguments(emoji, tmp_path / "encoded", dc_ae, precision="fp32"))
    common = (
        f"--codec.kind dc-ae --codec.path {dc_ae} --data.resolution {RESOLUTION} --data.horizontal_flip true "
        "--data.prompt_template '{}'"
    )
    from_images = train(tmp_path / "images", tmp_path, f"{common} --data.dataset parquet --data.path {emoji}")
    from_latents = train(
        tmp_path / "latents", tmp_path, f"{common} --data.dataset latents --data.path {tmp_path}/encoded"
    )
    for image, latent in zip(losses(from_images), losses(from_latents), strict=True):
        assert latent == pytest.approx(image, rel=5e-3)
        assert latent["loss"] == pytest.approx(image["loss"], rel=5e-4)
    assert losses(from_images) != losses(from_latents)  # rounding shows: two things were compared
