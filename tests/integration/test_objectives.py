"""A second objective, that of docs/extending.md, trains beside flow matching and alone: the trainer knows neither.

Promised here: all ranks train the same samples of both, and 1 and 2 ranks the same losses; a resumed run is exact; metrics.jsonl
has the keys of each; what no objective reaches stays as it is.
"""

import json

import pytest
import torch

from latte_flow.training.checkpoint.opening import read_weights
from tests.integration.launching import column, metrics
from tests.integration.test_resume import assert_same_metrics
from tests.integration.test_training import assert_losses_and_norms_agree, assert_weights_equal

BOTH = json.dumps({"unit_scale": 0.5, "flow_matching": 2.0})
STEPS = 4


def train(command, objectives: str, **fields):
    fields = {"max_steps": STEPS, "checkpoint__every": 2, "logging__every": 1, "sample__every": 2} | fields
    return command.train(hooks=("add_an_objective",), objectives=objectives, **fields)


@pytest.fixture(scope="module")
def joint(command):
    """Both objectives, on one rank, in micro-batches."""
    return train(command, BOTH, micro_batch_size=16)


def test_the_loss_is_the_weighted_sum_and_each_has_its_own(joint, one_rank):
    entries = metrics(joint.output_dir)
    for entry in entries:
        assert entry["loss"] == pytest.approx(
            2 * entry["loss_flow_matching"] + 0.5 * entry["loss_unit_scale"], rel=1e-12
        )
        groups = [entry[f"loss_group_{group}"] for group in range(4)]
        assert entry["loss_flow_matching"] == pytest.approx(sum(groups) / 4, rel=1e-12)
    alone = metrics(one_rank.output_dir)[0]
    assert entries[0].keys() - alone.keys() == {"loss_flow_matching", "loss_unit_scale"}
    assert alone.keys() <= entries[0].keys()
    assert entries[0]["loss_flow_matching"] == pytest.approx(alone["loss"], rel=1e-6)  # before the first update
    assert (joint.output_dir / "samples" / "step_0000004.png").is_file()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_train_the_same(command, joint, zero):
    assert_losses_and_norms_agree(train(command, BOTH, ranks=2, zero=zero), joint)


def test_a_resumed_run_is_exact(command, joint):
    stopped = train(command, BOTH, micro_batch_size=16, max_steps=2)
    resumed = train(command, BOTH, micro_batch_size=16, output_dir=stopped.output_dir)
    assert_same_metrics(resumed, joint)
    assert_weights_equal(resumed, joint, STEPS)
    refused = train(command, '{"flow_matching": 2.0}', output_dir=stopped.output_dir, code=2)
    assert "objectives.unit_scale: the run has 0.5, this command None" in refused.finished.output


def test_alone_it_trains_what_it_reaches(command):
    run = train(command, '{"unit_scale": 1}', max_steps=6, checkpoint__every=1, checkpoint__keep_last=0)
    losses = column(run.output_dir, "loss")
    assert losses[-1] < 0.9 * losses[0]
    names = {name for entry in metrics(run.output_dir) for name in entry if name.startswith("loss")}
    assert names == {"loss"}
    assert not (run.output_dir / "samples").exists()
    for which in ("model", "ema"):
        before, after = (read_weights(run.checkpoint(step), which) for step in (1, 6))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"image_io.0.patch_embed.weight", "image_io.0.patch_embed.bias"}
