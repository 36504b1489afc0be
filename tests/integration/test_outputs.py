"""What a run leaves behind: the layout of its output_dir, metrics.jsonl, TensorBoard, sample grids."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latte_flow.training.checkpoint.manifest import list_checkpoints, read_manifest
from latte_flow.training.configs.fields import Assumptions
from latte_flow.training.configs.saved import load_config
from latte_flow.training.dry_run import dry_run
from tests.integration.launching import column, metrics
from tests.integration.test_training import STEPS

GROUPS = range(4)
TIMESTEP_BINS = [f"{i * 100:04d}_{(i + 1) * 100:04d}" for i in range(10)]


def test_an_output_dir_is_laid_out_as_documented(two_ranks):
    folder = two_ranks.output_dir
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "checkpoints",
        "model",
    }
    assert {path.name for path in (folder / "model").iterdir()} == {"config.json", "pipeline.json", "tokenizer", "vlm"}
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_0000004", "step_0000008"]
    assert (folder / "checkpoints" / "latest").read_text() == "step_0000008"
    manifest = read_manifest(two_ranks.checkpoint(4))
    assert (manifest["step"], manifest["world_size"]) == (4, 2)
    files = {
        path.name: path.stat().st_size for path in two_ranks.checkpoint(4).iterdir() if path.name != "manifest.json"
    }
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == files
    assert sum(name.endswith("_optim_states.pt") for name in files) == 2


def test_the_saved_configuration_is_the_whole_run(two_ranks):
    config = load_config(two_ranks.output_dir / "config.yaml")
    assert config.output_dir == str(two_ranks.output_dir)
    assert config.deepspeed == "ds_configs/zero2.json"
    assert (config.max_steps, config.global_batch_size, config.vlm.tiny.hidden_size) == (STEPS, 32, 32)
    assert config.optimizer.lr == 2e-3  # of the preset
    assert config.model.residual_source == "raw"  # nobody set it


def test_the_doctor_warns_once_when_a_run_starts(command, two_ranks):
    assert "warning: " not in two_ranks.finished.output
    run = command.train(ranks=2, max_steps=2, sample__every=0, optimizer__grad_clip=0)
    assert run.finished.output.count("warning: optimizer.grad_clip: 0 disables clipping") == 1


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_a_run_holds_the_bytes_that_its_dry_run_counts(command, ranks, precision):
    """All that lasts from step to step; what autograd keeps is measured in tests/unit/test_dry_run.py."""
    run = command.train(ranks=ranks, precision=precision, max_steps=2, sample__every=0, hooks=("measure_memory",))
    counted = dry_run(load_config(run.output_dir / "config.yaml"), Assumptions(gpus=ranks)).memory
    for rank in range(ranks):
        held = json.loads((run.hook_dir / f"memory_{rank}.json").read_text())
        assert held.keys() <= counted.keys()
        # The shards are padded to equal size; ranks count together what is not sharded evenly.
        assert held == pytest.approx({name: counted[name] for name in held}, rel=2e-3)


def test_only_the_newest_checkpoints_are_kept(command):
    run = command.train(max_steps=5, sample__every=0, checkpoint__every=1, checkpoint__keep_last=2)
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")] == ["step_0000004", "step_0000005"]
    assert (run.output_dir / "checkpoints" / "latest").read_text() == "step_0000005"


def test_checkpoints_of_certain_steps_are_kept_for_good(command):
    fields = {"checkpoint__every": 1, "checkpoint__keep_last": 1, "checkpoint__keep_every": 2}
    run = command.train(max_steps=5, sample__every=0, **fields)
    kept = [path.name for path in list_checkpoints(run.output_dir / "checkpoints")]
    assert kept == ["step_0000002", "step_0000004", "step_0000005"]


def test_metrics_have_one_line_a_logged_step_with_all_that_is_promised(two_ranks):
    names = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "samples_per_second",
        "samples",
        "skipped_steps",
        "failed_saves",
        "failed_logs",
        "grad_norm_image_io",
    }
    names |= {f"loss_group_{k}" for k in GROUPS} | {f"grad_norm_group_{k}" for k in GROUPS}
    bins = {f"loss_tau_{name}" for name in TIMESTEP_BINS}
    lines = metrics(two_ranks.output_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert names <= line.keys() <= names | bins | line.keys() - {n for n in line if n.startswith("loss_")}
        assert line["loss"] == pytest.approx(np.mean([line[f"loss_group_{k}"] for k in GROUPS]))  # groups of equal size
        parts = [line[f"grad_norm_group_{k}"] for k in GROUPS] + [line["grad_norm_image_io"]]
        assert line["grad_norm"] == pytest.approx(np.linalg.norm(parts), rel=1e-5)
    assert set.union(*({n for n in line if n.startswith("loss_tau")} for line in lines)) == bins
    assert column(two_ranks.output_dir, "lr") == pytest.approx([2e-3 * min(1, n / 4) for n in range(1, STEPS + 1)])
    assert column(two_ranks.output_dir, "samples") == [32 * n for n in range(1, STEPS + 1)]


def test_tensorboard_shows_the_run(two_ranks):
    events = EventAccumulator(str(two_ranks.output_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    shown = {"train/loss", "train/lr", "train/grad_norm", "train/samples_per_second", "grad_norm_per_group/image_io"}
    shown |= {f"loss_per_group/{k}" for k in GROUPS} | {f"grad_norm_per_group/group_{k}" for k in GROUPS}
    shown |= {f"loss_per_timestep/{name}" for name in TIMESTEP_BINS}
    gated = [1, 3, 5, 7]  # the first layer of a group has no gate
    assert shown <= set(tags["scalars"])
    assert {tag for tag in tags["scalars"] if "gate" in tag} == {f"gate_mean/layer_{layer:02d}" for layer in gated}
    assert {f"gate/layer_{layer:02d}" for layer in gated} <= set(tags["histograms"])
    for name in ("loss", "lr", "grad_norm"):
        logged = events.Scalars(f"train/{name}")
        assert [event.step for event in logged] == list(range(1, STEPS + 1))
        assert [event.value for event in logged] == pytest.approx(column(two_ranks.output_dir, name))
    assert [image.step for image in events.Images("samples")] == [4, 8]
    (text,) = events.Tensors("config/text_summary")
    config = text.tensor_proto.string_val[0].decode()
    assert "global_batch_size: 32" in config
    assert "max_steps: 8" in config


def test_sample_grids_are_pictures_of_the_asked_size(two_ranks):
    grids = sorted((two_ranks.output_dir / "samples").iterdir())
    assert [path.name for path in grids] == ["step_0000004.png", "step_0000008.png"]
    pictures = [np.asarray(Image.open(path)) for path in grids]
    for picture in pictures:  # 20 digits of 8x8 enlarged 5 times, two rows of ten, 2 pixels between them
        assert picture.shape == (2 + 2 * 42, 2 + 10 * 42)
        assert len(np.unique(picture)) > 10
    assert not np.array_equal(*pictures)


def test_one_and_two_ranks_draw_the_same_grid(one_rank, two_ranks):
    ours, theirs = (
        np.asarray(Image.open(run.output_dir / "samples" / "step_0000008.png")).astype(int)
        for run in (one_rank, two_ranks)
    )
    assert np.abs(ours - theirs).max() <= 1


def test_a_grid_shows_the_images_that_the_sampling_tool_draws(command, one_rank, tmp_path):
    settings = ["--num_images", "20", "--seed", "0", "--cfg_scale", "2", "--num_steps", "8"]
    drawn = command.sample(one_rank.output_dir, *settings)
    grid = np.asarray(Image.open(one_rank.output_dir / "samples" / "step_0000008.png")).astype(int)
    overview = np.asarray(Image.open(drawn.output_dir / "grid.png")).astype(int)
    assert grid.shape == overview.shape
    assert np.abs(grid - overview).max() <= 1
    assert len(json.loads((drawn.output_dir / "samples.jsonl").read_text().splitlines()[0])) == 3


def test_an_output_dir_that_is_renamed_ends_the_run_in_one_line(command, tmp_path):
    """And nothing comes back under the old name: neither a log nor half a checkpoint."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    ranks = command.start(folder, ranks=2, max_steps=500, checkpoint__every=2, sample__every=0)
    while not list_checkpoints(folder / "checkpoints"):
        assert all(process.is_alive() for process in ranks.processes), ranks.log.read_text()
        time.sleep(0.01)
    folder.rename(moved)
    finished = ranks.wait()
    assert finished.code == 2, finished.output
    assert "Traceback" not in finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
    assert f"output_dir: {folder} was renamed, removed or replaced while the run was training; the steps after" in line
    assert not folder.exists()
    moved.rename(folder)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    steps = read_manifest(newest)["step"] + 1
    resumed = command.train(ranks=2, output_dir=folder, max_steps=steps, checkpoint__every=2, sample__every=0)
    assert f"resumed from {newest}" in resumed.finished.output
