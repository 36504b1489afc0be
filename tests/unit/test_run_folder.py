"""Which checkpoint a run starts from, and which output_dirs it may not touch."""

import json
from pathlib import Path

import pytest

from latte_flow.training.configs.parser import parse_config
from latte_flow.training.configs.saved import save_config
from latte_flow.training.errors import UserError
from latte_flow.training.run_folder import Origin, check_output_dir, find_origin


def make_run(folder: Path, *steps: int, **fields) -> Path:
    """Write what these functions read of a run: its configuration and the manifests of its checkpoints."""
    folder.mkdir()
    arguments = [text for name, value in fields.items() for text in (f"--{name.replace('__', '.')}", str(value))]
    save_config(parse_config(["--output_dir", str(folder), *arguments]), folder / "config.yaml")
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"step": step}))
    return folder


def start(output_dir: Path, resume, *arguments: str) -> Origin | None:
    return find_origin(parse_config(["--output_dir", str(output_dir), "--resume", str(resume), *arguments]))


@pytest.fixture
def other(tmp_path):
    return make_run(tmp_path / "other", 4, 8)


@pytest.mark.parametrize(
    ("which", "steps"), [(".", [4, 8]), ("checkpoints/step_0000004", [4]), ("checkpoints/step_0000008", [8])]
)
def test_a_new_run_starts_from_the_named_one(tmp_path, other, which, steps):
    found = start(tmp_path / "run", other / which)
    checkpoints = [other / "checkpoints" / f"step_{step:07d}" for step in steps]
    assert found == Origin(other / "config.yaml", other / "model", checkpoints)


def test_the_named_one_is_left_as_soon_as_there_are_own_checkpoints(tmp_path, other):
    """A job that is requeued starts with the same command, and the named checkpoint may be gone by then."""
    run = make_run(tmp_path / "run")
    assert start(run, other).config_file.parent == other
    later = make_run(tmp_path / "later", 9)
    assert start(later, other) is None
    assert start(later, other / "checkpoints" / "step_0000001") is None


def test_a_converted_checkpoint_is_no_output_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"output_dir: .* is a converted checkpoint; accepted: another folder, with --resume"
    ):
        check_output_dir(parse_config(["--output_dir", str(tmp_path)]))


def test_auto_and_never(tmp_path, other):
    for resume in ("auto", "never"):
        assert start(tmp_path / "run", resume) is None
    assert start(other, "auto") is None
    with pytest.raises(
        UserError, match=r"resume: never, but .*other has 2 checkpoints, the newest step_0000008; accepted: auto"
    ):
        start(other, "never")


@pytest.mark.parametrize("path", ["missing", ".", "checkpoints", "checkpoints/step_0000005"])
def test_what_holds_no_checkpoint(tmp_path, path):
    empty = make_run(tmp_path / "empty")
    with pytest.raises(
        UserError, match=r"resume: .* holds no checkpoint; accepted: auto, never, a training output_dir"
    ):
        start(tmp_path / "run", empty / path)


def test_a_runs_own_newest_is_no_other_run_and_an_older_one_is_refused(other):
    assert start(other, other) is None
    assert start(other, other / "checkpoints" / "step_0000008") is None
    with pytest.raises(UserError, match=r"step_0000004 is not the newest .* accepted: another output_dir"):
        start(other, other / "checkpoints" / "step_0000004")


@pytest.mark.parametrize(
    ("changed", "accepted"),
    [
        (("--optimizer.lr", "1"), True),
        (("--seed", "5"), True),
        (("--model.attention_backend", "sdpa"), True),
        (("--model.num_groups", "2"), False),
        (("--vlm.tiny.seed", "1"), False),
        (("--codec.patch", "2"), False),
    ],
)
def test_a_run_may_start_from_one_that_differs_in_all_but_the_network(tmp_path, other, changed, accepted):
    if accepted:
        assert start(tmp_path / "run", other, *changed).config_file.parent == other
        return
    with pytest.raises(
        UserError, match=rf"resume: .* belongs to another network \({changed[0].removeprefix('--')}: the run has"
    ):
        start(tmp_path / "run", other, *changed)


def test_a_checkpoint_that_was_moved_away_from_its_run(tmp_path, other):
    (other / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"resume: .*config.yaml not found; accepted: a checkpoint in the output_dir"):
        start(tmp_path / "run", other)


def test_output_dirs_that_may_be_used(tmp_path, other):
    check_output_dir(parse_config(["--output_dir", str(tmp_path / "new")]))
    check_output_dir(parse_config(["--output_dir", str(other), "--max_steps", "9"]))
    (tmp_path / "asked to stop").mkdir()
    (tmp_path / "asked to stop" / "stop").touch()
    (tmp_path / "asked to stop" / "config.yaml.partial-host-1").touch()  # killed before anything else was written
    check_output_dir(parse_config(["--output_dir", str(tmp_path / "asked to stop")]))


def test_output_dirs_of_others(tmp_path, other):
    with pytest.raises(
        UserError, match=r"output_dir: .*other holds a run with another configuration \(seed: the run has 0"
    ):
        check_output_dir(parse_config(["--output_dir", str(other), "--seed", "1"]))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    for path in (tmp_path / "photos", tmp_path / "photos" / "1.jpg"):
        with pytest.raises(UserError, match=r"output_dir: .* exists and is not a training run"):
            check_output_dir(parse_config(["--output_dir", str(path)]))
