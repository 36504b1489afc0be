"""Runs that start from converted checkpoints: with the optimizer's state from a universal one, with weights from any format."""

import re

import pytest
import torch

from latte_flow.tools.conversion.convert import convert
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.opening import load_pipeline, read_weights
from tests.integration.launching import column, metrics
from tests.integration.test_elastic import assert_state_is
from tests.integration.test_training import assert_same_batches, recorded


def assert_last_losses_agree(run, whole) -> None:
    for name in ("loss", "grad_norm", "samples"):
        theirs = column(whole.output_dir, name)[-4:]
        assert column(run.output_dir, name) == pytest.approx(theirs, rel=1e-4), name


def test_a_universal_checkpoint_goes_on_with_the_training(command, one_rank, tmp_path):
    """From 2 ranks of ZeRO-3 through the file to one of ZeRO-1, and with tensor parallelism: samples, state, losses."""
    first = command.train(ranks=2, zero="zero3", max_steps=4, sample__every=0, hooks=("record_batches",))
    universal = convert(first.output_dir, tmp_path / "universal", to="deepspeed-universal")
    run = command.train(
        zero="zero1",
        resume=universal,
        output_dir=tmp_path / "run",
        hooks=("record_batches", "dump_state"),
        sample__every=0,
    )
    assert f"a new run from {universal}" in run.finished.output
    assert_state_is(run, open_weights(universal))
    assert_same_batches(recorded(one_rank), recorded(first) | recorded(run))
    assert_last_losses_agree(run, one_rank)
    again = command.train(zero="zero1", resume=universal, output_dir=tmp_path / "run", sample__every=0, max_steps=9)
    assert f"resumed from {run.checkpoint(8)}" in again.finished.output
    parallel = command.train(
        ranks=2, tensor_parallel=2, resume=universal, output_dir=tmp_path / "parallel", sample__every=0
    )
    assert_last_losses_agree(parallel, one_rank)


def test_a_damaged_universal_checkpoint_is_refused(command, tmp_path):
    first = command.train(max_steps=2, checkpoint__every=2, sample__every=0)
    universal = convert(first.output_dir, tmp_path / "universal", to="deepspeed-universal")
    file = universal / "zero" / "image_io.0.head.weight" / "exp_avg.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = command.train(resume=universal, output_dir=tmp_path / "run", code=2)
    assert "image_io.0.head.weight/exp_avg.pt has another SHA-256" in run.finished.output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("variant", "to", "precision"), [("couple", "megatron-dist", "bf16"), ("blend", "safetensors-sharded", "fp32")]
)
def test_weights_of_any_format_start_a_new_run(command, tmp_path, variant, to, precision):
    """In float32, also in bf16. The first loss is that of the loaded network, and the VLM the one that it was trained with."""
    first = command.train(model__variant=variant, sample__every=0)
    folder = convert(first.output_dir, tmp_path / "weights", to=to)
    fields = {"model__variant": variant, "init_from": folder, "sample__every": 0, "vlm__tiny__seed": 5, "max_steps": 1}
    fields |= {"precision": precision}
    run = command.train(**fields, optimizer__lr=1e-30)
    assert f"initial weights from {folder}" in run.finished.output
    before, after = read_weights(first.checkpoint(8), "ema"), read_weights(run.checkpoint(1), "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    ours, theirs = (load_pipeline(r.output_dir) for r in (run, first))
    assert torch.equal(ours.backbone.lm_head.weight, theirs.backbone.lm_head.weight)
    assert (ours.generate([1, 2], num_steps=4) == theirs.generate([1, 2], num_steps=4)).all()
    scratch = command.train(model__variant=variant, sample__every=0, max_steps=1)
    assert column(run.output_dir, "loss")[0] < column(scratch.output_dir, "loss")[0]
    # Once there are checkpoints, the run's own are what it resumes from; the weights may be gone.
    folder.rename(tmp_path / "gone")
    again = command.train(**fields | {"max_steps": 2}, optimizer__lr=1e-30, output_dir=run.output_dir)
    assert f"resumed from {run.checkpoint(1)}" in again.finished.output
    assert len(metrics(run.output_dir)) == 2


def test_what_cannot_start_a_run_says_so(command, tmp_path):
    first = command.train(max_steps=2, checkpoint__every=2, sample__every=0)
    weights = convert(first.output_dir, tmp_path / "weights", to="pt")
    lonely = tmp_path / "lonely.pt"
    torch.save({"weight": torch.zeros(1)}, lonely)
    for fields, message in [
        (
            {"resume": weights},
            f"resume: {weights} holds weights as pt and no optimizer state; accepted: --init_from {weights}",
        ),
        (
            {"init_from": tmp_path / "none"},
            f"init_from: {tmp_path / 'none'}: not found; accepted: a training output_dir",
        ),
        ({"init_from": lonely}, f"init_from: {lonely} has no pipeline.json beside it"),
        (
            {"init_from": weights, "model__num_groups": 2},
            r"init_from: .*weights: 2 missing: layers.2.residual_gate.weight",
        ),
        ({"init_from": weights, "resume": first.output_dir}, "init_from, resume: got .* accepted: one of them"),
    ]:
        run = command.train(**fields, output_dir=tmp_path / "run", code=2)
        assert re.search(message if "*" in message else re.escape(message), run.finished.output), run.finished.output
    assert not (tmp_path / "run").exists()
