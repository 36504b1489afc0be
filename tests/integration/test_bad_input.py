"""Bad input ends with one clear line and a non-zero exit code; nothing is overwritten."""

import json
from pathlib import Path

import datasets
import pytest

from tests.integration.launching import TINY_RUN, run, train, train_alone
from training.errors import exit_code
from training.main import main


def assert_refused(finished, *words: str) -> None:
    """The program failed with one line of error that has these words, and without a traceback."""
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert finished.code != 0
    assert len(errors) == 1, finished.output
    assert "Traceback" not in finished.output
    for word in words:
        assert word in errors[0], errors[0]


def test_an_unknown_field_on_the_command_line(tmp_path):
    finished = train_alone("--output_dir", str(tmp_path / "run"), "--optimizer.learning_rate", "1")
    assert_refused(finished, "--optimizer.learning_rate")
    assert not (tmp_path / "run").exists()


def test_an_unknown_field_in_a_file_under_the_launcher(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("max_step: 3\n")
    finished = train(tmp_path / "run", "--config", str(preset))
    assert_refused(finished, "max_step")
    assert not (tmp_path / "run").exists()


def test_groups_that_do_not_divide_the_layers_under_the_launcher(tmp_path):
    finished = train(tmp_path / "run", "--model.num_groups", "3", ranks=2)
    assert_refused(finished, "num_groups", "3", "1, 2, 4, 8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--deepspeed", "missing.json"], ["missing.json"], id="missing-deepspeed"),
        pytest.param(["--vlm.path", "missing_folder"], ["vlm.path", "missing_folder"], id="missing-vlm"),
        pytest.param(["--global_batch_size", "30"], ["micro_batch_size", "4 groups"], id="micro-batch"),
    ],
)
def test_values_that_do_not_fit(tmp_path, arguments, words):
    assert_refused(train_alone("--output_dir", str(tmp_path / "run"), *arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--config", "missing.yaml"], ["missing.yaml"], id="missing-preset"),
        pytest.param(["--max_steps", "many"], ["max_steps", "int"], id="wrong-type"),
        pytest.param(["--data.prompt_template", "a digit"], ["data.prompt_template", "{}"], id="template"),
    ],
)
def test_what_cannot_be_parsed(monkeypatch, capfd, arguments, words):
    monkeypatch.setattr("sys.argv", ["training/main.py", *arguments])
    assert exit_code(main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_zero_images(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "text": []}, features=features)
    empty.to_parquet(tmp_path / "empty.parquet")
    arguments = ["--data.dataset", "parquet", "--data.path", str(tmp_path / "empty.parquet")]
    finished = train_alone("--output_dir", str(tmp_path / "run"), *arguments)
    assert_refused(finished, "data.path", "zero images")


def test_a_contradiction_with_the_deepspeed_configuration(tmp_path):
    settings = json.loads(Path("ds_configs/zero2.json").read_text())
    settings["gradient_clipping"] = 0.5
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    arguments = ["--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "zero2.json")]
    assert_refused(train_alone(*arguments), "optimizer.grad_clip", "gradient_clipping", "0.5", "1.0")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(train_alone("--output_dir", str(tmp_path)), "output_dir", "not a training run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    finished = train_alone(*TINY_RUN, "--output_dir", str(output), "--max_steps", "2")
    assert finished.code == 0, finished.output
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_another_configuration_is_not_overwritten(finished_run):
    before = contents(finished_run)
    changed = ["--output_dir", str(finished_run), "--max_steps", "4", "--optimizer.lr", "1", "--model.num_groups", "2"]
    assert_refused(train_alone(*TINY_RUN, *changed), "optimizer.lr", "model.num_groups", "0.002")
    assert contents(finished_run) == before


def test_damaged_checkpoints_are_an_error_and_not_a_restart_from_zero(finished_run):
    checkpoint = finished_run / "checkpoints" / "step_0000002"
    shard = next(checkpoint.glob("*optim_states.pt"))
    whole = shard.read_bytes()
    try:
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        shard.write_bytes(flipped)
        before = contents(finished_run)
        finished = train_alone(*TINY_RUN, "--output_dir", str(finished_run), "--max_steps", "4")
        assert_refused(finished, "damaged")
        assert shard.name in finished.output
        after = contents(finished_run)
        assert {name: after[name] for name in before} == before
        sampled = run(["python", "tools/sample.py", str(checkpoint), "--output", str(finished_run / "drawn")])
        assert_refused(sampled, shard.name, "SHA-256")
    finally:
        shard.write_bytes(whole)


def test_sampling_refuses_what_it_cannot_draw(finished_run, tmp_path):
    def sample(*arguments):
        return run(["python", "tools/sample.py", *arguments])

    output = ["--output", str(tmp_path / "drawn")]
    assert_refused(sample(str(tmp_path / "nowhere"), *output), "nowhere", "output_dir")
    assert_refused(sample(str(finished_run), *output, "--classes", "12"), "classes", "0 to 9")
    assert not (tmp_path / "drawn").exists()
