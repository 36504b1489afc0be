"""tools/sample.py: what it writes, and that an image depends on its seed and its number alone."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from latte_flow.training.checkpoint.opening import load_pipeline
from tests.integration.launching import ROOT


def images(drawn) -> list[np.ndarray]:
    """Return the images that a call has drawn."""
    return [np.asarray(Image.open(path)) for path in sorted(drawn.output_dir.glob("0*.png"))]


def index(drawn) -> list[dict]:
    """Return the lines of samples.jsonl."""
    return [json.loads(line) for line in (drawn.output_dir / "samples.jsonl").read_text().splitlines()]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Whether two lists of images are the same bytes."""
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def one_of_each(command, one_rank):
    """One image of each class from the averaged weights of the last step."""
    return command.sample(one_rank.output_dir)


def test_one_image_of_each_class_by_default(one_of_each):
    names = {f"{i:06d}.png" for i in range(10)}
    assert {path.name for path in one_of_each.output_dir.iterdir()} == names | {"samples.jsonl", "grid.png"}
    lines = index(one_of_each)
    assert [line["class"] for line in lines] == list(range(10))
    assert [line["file"] for line in lines] == sorted(names)
    assert len({line["seed"] for line in lines}) == 10
    for name in names:
        picture = Image.open(one_of_each.output_dir / name)
        assert (picture.size, picture.mode) == ((8, 8), "L")


def test_images_run_through_the_classes_evenly(command, one_rank):
    drawn = command.sample(one_rank.output_dir, "--classes", "3,1", "--num_images", "5", "--seed", "7")
    assert [line["class"] for line in index(drawn)] == [3, 1, 3, 1, 3]
    assert len(images(drawn)) == 5
    assert not np.array_equal(images(drawn)[0], images(drawn)[2])


def test_the_batch_size_does_not_show(command, one_rank):
    arguments = ["--classes", "3,1,8", "--num_images", "7", "--seed", "5"]
    together, apart, threes = (
        command.sample(one_rank.output_dir, *arguments, "--batch_size", size) for size in ("50", "1", "3")
    )
    assert index(together) == index(apart) == index(threes)
    for other in (apart, threes):
        for a, b in zip(images(together), images(other), strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1


def test_ranks_share_the_batches_and_do_not_show(command, one_rank):
    arguments = ["--num_images", "11", "--batch_size", "2"]
    alone, together = (command.sample(one_rank.output_dir, *arguments, ranks=ranks) for ranks in (1, 3))
    assert same(images(together), images(alone))
    for name in ("samples.jsonl", "grid.png"):
        assert (together.output_dir / name).read_bytes() == (alone.output_dir / name).read_bytes()


def test_a_checkpoint_that_its_run_removes_while_one_rank_reads_it(command, one_rank, one_of_each, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(one_rank.output_dir, run)
    newer = (run / "checkpoints" / "step_0000008").rename(tmp_path / "step_0000008")
    drawn = command.sample(
        run,
        *("--batch_size", "5"),
        ranks=2,
        hooks=("remove_while_read",),
        variables={"REMOVE": f"{run / 'checkpoints' / 'step_0000004'} {newer}"},
    )
    assert not newer.exists()
    assert same(images(drawn), images(one_of_each))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(command, one_rank, one_of_each):
    assert same(images(command.sample(one_rank.output_dir, "--seed", "0")), images(one_of_each))
    assert not same(images(command.sample(one_rank.output_dir, "--seed", "1")), images(one_of_each))


def test_a_step_folder_names_that_step(command, one_rank, one_of_each):
    assert same(images(command.sample(one_rank.checkpoint(8))), images(one_of_each))
    assert not same(images(command.sample(one_rank.checkpoint(4))), images(one_of_each))


def test_trained_and_averaged_weights_draw_different_images(command, one_rank, one_of_each):
    assert not same(images(command.sample(one_rank.output_dir, "--weights", "model")), images(one_of_each))
    assert same(images(command.sample(one_rank.output_dir, "--weights", "ema")), images(one_of_each))


def test_an_exported_model_folder_is_a_checkpoint_too(command, one_rank, one_of_each, tmp_path):
    load_pipeline(one_rank.output_dir).save_pretrained(tmp_path / "exported")
    assert same(images(command.sample(tmp_path / "exported")), images(one_of_each))


def test_classes_can_be_asked_for_as_prompts(command, one_rank, one_of_each):
    drawn = command.sample(one_rank.output_dir, "--prompts", "zero", "one")
    assert [line["prompt"] for line in index(drawn)] == ["zero", "one"]
    for a, b in zip(images(drawn), images(one_of_each)[:2], strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_a_run_copied_elsewhere_can_be_sampled(command, one_rank, one_of_each, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("model", "checkpoints"):
        (moved / name).symlink_to(one_rank.output_dir / name)
    assert same(images(command.sample(moved)), images(one_of_each))


def test_the_quickstarts_python(one_rank, tmp_path, monkeypatch):
    """docs/quickstart.md's lines as they stand there; ``ask`` is answered for a picture that the pipeline has drawn."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(one_rank.output_dir)
    names: dict = {}
    exec(code, names)
    drawn = load_pipeline(one_rank.output_dir).generate([3, 1, 4], seed=0, num_steps=20, cfg_scale=2.0)
    for ours, expected in zip(names["images"], drawn, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - expected).max() <= 1
    assert isinstance(names["answer"], str)
