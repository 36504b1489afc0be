"""The config doctor: a line for each way to waste GPU hours, and none for the presets."""

import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.doctor import Facts, examine

FULL = Facts(trained=1_582_860_000, weights_bytes=3_165_720_000, num_groups=4, latent_std=1.0, seconds_per_step=0.1)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A large disk, and no job."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50))
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


def preset(*arguments: str) -> TrainingConfig:
    return parse_config(["--config", "training/configs/couple_imagenet256.yaml", *arguments])


def test_the_presets_are_healthy():
    assert examine(preset(), FULL) == []
    digits = parse_config(["--config", "training/configs/digits.yaml"])
    assert examine(digits, Facts(trained=5_000_000, weights_bytes=20_000_000, num_groups=4)) == []


@pytest.mark.parametrize(
    ("arguments", "changes", "field", "remedy"),
    [
        (["--optimizer.grad_clip", "0"], {}, "optimizer.grad_clip: 0", "1.0"),
        (["--vlm.path", "null"], {}, "vlm.path: null", "Qwen/Qwen2-VL-2B-Instruct"),
        ([], {"latent_std": 3.13}, "data.path: the latents' standard deviation is 3.13", "scaling factor"),
        ([], {"latent_std": 0.3}, "data.path: the latents' standard deviation is 0.3", "scaling factor"),
        ([], {"trained": 0}, "model: no parameter is trained", "objectives"),
        ([], {"trained": 3_000_000}, "model: 3.00 M parameters are trained", "1,580 M"),
        (["--sample.num_steps", "3"], {}, "sample.num_steps: 3", "4 or more"),
        (["--optimizer.lr", "5e-3"], {}, "optimizer.lr: 0.005", "0.0005"),
        (["--global_batch_size", "64"], {}, "optimizer.lr: 0.0005 at global_batch_size 64", "8.8e-05"),
    ],
)
def test_a_warning_names_the_field_and_the_remedy(arguments, changes, field, remedy):
    (warning,) = examine(preset(*arguments), replace(FULL, **changes))
    assert warning.startswith(field)
    assert remedy in warning


def test_a_small_network_may_have_any_learning_rate():
    digits = parse_config(["--config", "training/configs/digits.yaml", "--optimizer.lr", "0.02"])
    assert examine(digits, Facts(trained=5_000_000, weights_bytes=20_000_000, num_groups=4)) == []


@pytest.mark.parametrize(("hours", "warns"), [(1.0, False), (0.1, True)])
def test_an_interval_longer_than_the_job(monkeypatch, hours, warns):
    """5000 steps of 0.1 s are 0.14 hours."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(1000 + 3600 * hours)))
    warnings = examine(preset(), FULL)
    assert len(warnings) == warns
    if warns:
        assert warnings[0].startswith("checkpoint.every: 5000 steps take 0.14 hours, and the job ends in 0.1: ")
        assert warnings[0].endswith("at most 3600 would not")


@pytest.mark.parametrize(("gib", "warns"), [(107, False), (105, True)])
def test_a_disk_too_small_for_the_checkpoints(monkeypatch, gib, warns):
    """Each is 16 bytes a parameter and the weights: 26.53 GiB; three are kept while a fourth is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * 2**30))
    warnings = examine(preset(), FULL)
    assert len(warnings) == warns
    if warns:
        assert warnings[0].startswith(
            "checkpoint.keep_last: 4 checkpoints of 26.5 GiB need 106 GiB, and 105 GiB are free"
        )
