"""The default preset learns: a classifier of real digits recognises what the prompts asked for, for Couple and for Blend."""

import pytest

from tests.integration.launching import environment, run, train
from tools.digit_accuracy import digit_accuracy


# Fewer steps than the preset's 450: enough for the preset's promise, and the suite stays short.
@pytest.mark.parametrize(("variant", "steps"), [("couple", 300), ("blend", 200)])
def test_a_classifier_of_real_digits_recognises_the_samples(tmp_path, variant, steps):
    output = tmp_path / variant
    arguments = ["--deepspeed", "ds_configs/zero2.json", "--output_dir", str(output), "--model.variant", variant]
    finished = train(*arguments, "--max_steps", str(steps), "--sample.every", "0", threads=2)
    assert finished.code == 0, finished.output
    for cfg_scale, at_least in ((2, 0.97), (1, 0.85)):
        samples = output / f"cfg_{cfg_scale}"
        command = ["python", "tools/sample.py", str(output), "--output", str(samples), "--num_images", "500"]
        command += ["--cfg_scale", str(cfg_scale), "--num_steps", "20", "--batch_size", "250"]
        drawn = run(command, env=environment(threads=2))
        assert drawn.code == 0, drawn.output
        report = digit_accuracy(samples)
        assert report["num_samples"] == 500
        assert report["accuracy_on_held_out_real_digits"] > 0.98
        assert report["accuracy"] >= at_least, report
