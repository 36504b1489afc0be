"""The default preset learns: a classifier of real digits recognises what the prompts asked for, for Couple and for Blend."""

import pytest

from latte_flow.tools.digit_accuracy import digit_accuracy

VARIANTS = ("couple", "blend")
NARROW = {"vlm__tiny__hidden_size": 64, "vlm__tiny__intermediate_size": 128, "optimizer__lr": 4e-3}
SHORT = {"global_batch_size": 64, "max_steps": 250, "checkpoint__every": 250, "sample__every": 0, "logging__every": 50}
"""A seventh of the preset's samples, on half its width: enough to have learnt most of it."""
IMAGES = 120


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory):
    """Both variants, at the same time: each takes one core."""
    folder = tmp_path_factory.mktemp("quality")
    started = {v: command.start(folder / v, model__variant=v, **NARROW, **SHORT) for v in VARIANTS}
    for run in started.values():
        finished = run.wait()
        assert finished.code == 0, finished.output
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("cfg_scale", "at_least"), [(2, 0.88), (1, 0.5)])  # the whole preset: 99 % and 94 % (README)
def test_a_classifier_of_real_digits_recognises_the_samples(command, runs, variant, cfg_scale, at_least):
    settings = ["--num_images", str(IMAGES), "--cfg_scale", str(cfg_scale), "--num_steps", "20", "--batch_size", "250"]
    drawn = command.sample(runs / variant, *settings)
    report = digit_accuracy(drawn.output_dir)
    assert report["num_samples"] == IMAGES
    assert report["accuracy_on_held_out_real_digits"] > 0.98
    assert report["accuracy"] >= at_least, report
