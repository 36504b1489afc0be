"""Bad input ends with one line that names the field and what is accepted, and a non-zero exit code; nothing is overwritten."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from tests.integration.launching import ROOT, environment, free_port, run


def assert_refused(finished, *words: str) -> None:
    """The program failed with one line of error that has these words, and without a traceback."""
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert finished.code != 0, finished.output
    assert len(errors) == 1, finished.output
    assert "Traceback" not in finished.output
    for word in words:
        assert word in errors[0], errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def short_run(command):
    """A finished run of two steps with a checkpoint of each."""
    return command.train(max_steps=2, checkpoint__every=1, sample__every=0)


# Under the real launcher: the exit code has to come through it


def test_an_unknown_field_in_a_file_under_the_launcher(tmp_path):
    """The first rank says the error, also when it finds it last: the launcher ends all ranks as soon as one has failed."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("max_step: 3\n")
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0': time.sleep(2.5)\n")
    late = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "training/main.py"]
    fields = ["--config", str(preset), "--output_dir", str(tmp_path / "run")]
    assert_refused(run([*command, *fields], env=late), "max_step")
    assert not (tmp_path / "run").exists()


# One process


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--optimizer.learning_rate", "1"], ["optimizer.learning_rate"], id="unknown-field"),
        pytest.param(["--model.num_groups", "3"], ["num_groups", "3", "1, 2, 4, 8"], id="groups"),
        pytest.param(
            ["--sample.num_steps", "3"], ["sample.num_steps: 3 steps run 3 of the 4 experts"], id="grid-steps"
        ),
        pytest.param(["--max_steps", "many"], ["max_steps", "int"], id="wrong-type"),
        pytest.param(["--max_steps", "0"], ["max_steps", "0", "greater than 0"], id="out-of-range"),
        pytest.param(["--data.prompt_template", "a digit"], ["data.prompt_template", "{}"], id="template"),
        pytest.param(["--config", "missing.yaml"], ["missing.yaml"], id="missing-preset"),
        pytest.param(
            ["--deepspeed", "missing.json"], ["deepspeed", "missing.json", "zero2.json"], id="missing-deepspeed"
        ),
        pytest.param(["--vlm.path", "missing_folder"], ["vlm.path", "missing_folder"], id="missing-vlm"),
        pytest.param(["--global_batch_size", "30"], ["micro_batch_size", "4 groups"], id="batch-of-30"),
        pytest.param(
            ["--micro_batch_size", "6", "--global_batch_size", "12"], ["micro_batch_size: 6", "4 groups"], id="of-6"
        ),
        pytest.param(["--micro_batch_size", "5"], ["micro_batch_size: 5", "divisors of 256"], id="no-divisor"),
        pytest.param(["--model.num_groups", "3"], ["num_groups", "1, 2, 4, 8"], id="groups"),
        pytest.param(["--model.variant", "mix"], ["model.variant", "couple", "blend"], id="variant"),
        pytest.param(["--data.resolution", "16"], ["data.resolution", "8"], id="resolution"),
        pytest.param(["--data.dataset", "parquet"], ["data.path"], id="no-data-path"),
    ],
)
def test_values_that_do_not_fit(command, tmp_path, arguments, words):
    assert_refused(command.main("--output_dir", str(tmp_path / "run"), *arguments), *words)
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_data_worker_is_one_line(command, tmp_path):
    """Pictures are decoded in worker processes, whose errors torch wraps in tracebacks."""
    broken = {"image": [{"bytes": b"no picture", "path": None}] * 40, "label": [0] * 40}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict(broken, features=features).to_parquet(tmp_path / "broken.parquet")
    data = ["--data.dataset", "parquet", "--data.path", str(tmp_path / "broken.parquet"), "--data.num_workers", "1"]
    run = command.main("--output_dir", str(tmp_path / "run"), "--max_steps", "2", *data)
    assert_refused(run, "data.max_broken_fraction: 1 broken images", "broken.parquet", "accepted: at most 0 of 40")


def test_a_file_that_is_no_yaml(command, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("max_steps: [3\n  lr")
    assert_refused(command.main("--output_dir", str(tmp_path / "run"), "--config", str(preset)), "preset.yaml")
    assert not (tmp_path / "run").exists()


def test_zero_images(command, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "text": []}, features=features)
    empty.to_parquet(tmp_path / "empty.parquet")
    data = ["--data.dataset", "parquet", "--data.path", str(tmp_path / "empty.parquet")]
    assert_refused(
        command.main("--output_dir", str(tmp_path / "run"), *data), "data.path", "empty.parquet", "zero images"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            {"gradient_clipping": 0.5}, ["optimizer.grad_clip", "gradient_clipping", "0.5", "1.0"], id="clipping"
        ),
        pytest.param({"train_batch_size": 64}, ["global_batch_size", "train_batch_size", "64", "256"], id="batch"),
        pytest.param({"bf16": {"enabled": True}}, ["precision", "bf16.enabled", "True"], id="precision"),
        pytest.param({"optimizer": {"type": "AdamW"}}, ["deepspeed", "optimizer"], id="optimizer"),
        pytest.param({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage 0", "1, 2, 3"], id="stage"),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_the_run(command, tmp_path, change, words):
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | change
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    refused = command.main("--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "zero.json"))
    assert_refused(refused, "zero.json", *words)
    assert not (tmp_path / "run").exists()


# Folders that hold something already


def test_a_folder_of_something_else_is_left_alone(command, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(
        command.main("--output_dir", str(tmp_path)), "output_dir", "not a training run", "a new or empty folder"
    )
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_file_in_place_of_the_folder_is_left_alone(command, tmp_path):
    (tmp_path / "run").write_text("years of work")
    assert_refused(command.main("--output_dir", str(tmp_path / "run")), "output_dir", "a new or empty folder")
    assert (tmp_path / "run").read_text() == "years of work"


def test_a_run_of_another_configuration_is_not_overwritten(command, short_run):
    before = contents(short_run.output_dir)
    refused = command.train(
        output_dir=short_run.output_dir, max_steps=4, optimizer__lr=1, model__num_groups=2, code=None
    )
    assert_refused(
        refused.finished, "output_dir", "optimizer.lr", "0.002", "1.0", "model.num_groups", "another output_dir"
    )
    assert contents(short_run.output_dir) == before


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing", "manifest"])
def test_damaged_checkpoints_are_an_error_and_not_a_restart_from_zero(command, short_run, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(short_run.output_dir, folder)
    text = (folder / "config.yaml").read_text().replace(str(short_run.output_dir), str(folder))
    (folder / "config.yaml").write_text(text)
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        shard = next(checkpoint.glob("*_optim_states.pt"))
        content = bytearray(shard.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        elif damage == "shorter":
            shard.write_bytes(content[:-1])
        elif damage == "missing":
            shard.unlink()
        else:
            (checkpoint / "manifest.json").write_text("{")
    before = contents(folder)
    again = command.train(output_dir=folder, max_steps=4, checkpoint__every=1, sample__every=0, code=None)
    assert_refused(again.finished, "2 checkpoints", "damaged")
    expected = "manifest.json" if damage == "manifest" else "optim_states.pt"
    assert again.finished.output.count(expected) >= 2  # each is named
    assert contents(folder) == before
    assert_refused(command.sample(folder, code=None).finished, str(folder), "no valid checkpoint")
    step = folder / "checkpoints" / "step_0000002"
    assert_refused(command.sample(step, code=None).finished, expected)


# Sampling


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--classes", "12"], ["classes", "12", "0 to 9"], id="class"),
        pytest.param(["--classes", "a"], ["classes", "'a'", "0,1,2"], id="no-number"),
        pytest.param(["--classes", "1", "--prompts", "one"], ["classes", "prompts", "one of them"], id="both"),
        pytest.param(["--num_images", "0"], ["num_images", "1 or more"], id="no-images"),
        pytest.param(["--batch_size", "0"], ["batch_size", "1 or more"], id="batch"),
        pytest.param(["--seed", "-1"], ["seed", "-1", "0 to 2^32 - 1"], id="seed"),
        pytest.param(["--num_steps", "0"], ["num_steps", "1 or more"], id="steps"),
        pytest.param(
            ["--num_steps", "3"], ["num_steps: 3 steps run 3 of the 4 experts"], id="fewer-steps-than-experts"
        ),
        pytest.param(["--solver", "rk4"], ["solver", "'rk4'", "euler, heun, ab2, dpmpp, sde"], id="solver"),
        pytest.param(["--time_grid", "cosine"], ["time_grid", "'cosine'", "uniform, shifted"], id="grid"),
        pytest.param(["--timesteps", "1000,x"], ["timesteps", "'1000,x'"], id="no-timestep"),
        pytest.param(["--timesteps", "900,0"], ["timesteps", "strictly descending from 1000 to 0"], id="timesteps"),
        pytest.param(["--cfg_scale", "nan"], ["cfg_scale", "nan"], id="guidance"),
    ],
)
def test_sampling_refuses_what_it_cannot_draw(command, short_run, arguments, words):
    drawn = command.sample(short_run.output_dir, *arguments, code=None)
    assert_refused(drawn.finished, *words)
    assert not drawn.output_dir.exists()


def test_sampling_refuses_a_folder_that_is_no_checkpoint(command, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        drawn = command.sample(folder, code=None)
        assert_refused(drawn.finished, str(folder), "a training output_dir")
        assert not drawn.output_dir.exists()


def test_sampling_does_not_overwrite_samples(command, short_run):
    drawn = command.sample(short_run.output_dir, "--classes", "1")
    before = contents(drawn.output_dir)
    assert_refused(
        command.sample(short_run.output_dir, output=drawn.output_dir, code=None).finished, "output", "another folder"
    )
    assert contents(drawn.output_dir) == before
