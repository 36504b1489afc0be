"""The default preset learns: a classifier of real digits recognises what the prompts asked for, for Couple and for Blend."""

import pytest

from tests.integration.launching import run, train
from tools.digit_accuracy import digit_accuracy

# Two thirds of the preset's steps: enough for the preset's promise, and the suite stays short.
STEPS = 300


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_a_classifier_of_real_digits_recognises_the_samples(tmp_path, variant):
    output = tmp_path / variant
    arguments = ["--model.variant", variant, "--max_steps", str(STEPS), "--sample.every", "0"]
    finished = train(output, *arguments, threads=2)
    assert finished.code == 0, finished.output
    for cfg_scale, at_least in ((2, 0.97), (1, 0.85)):
        samples = output / f"cfg_{cfg_scale}"
        command = ["python", "tools/sample.py", str(output), "--output", str(samples), "--num_images", "500"]
        drawn = run([*command, "--cfg_scale", str(cfg_scale), "--batch_size", "250"])
        assert drawn.code == 0, drawn.output
        report = digit_accuracy(samples)
        assert report["num_samples"] == 500
        assert report["accuracy_on_held_out_real_digits"] > 0.98
        assert report["accuracy"] >= at_least, report
