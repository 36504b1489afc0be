"""A run resumes with other ranks and another ZeRO stage: the same state, the same samples, losses equal to rounding."""

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.checkpoint.formats.zero_source import ZeroSource
from latte_flow.training.checkpoint.opening import read_weights
from tests.integration.test_training import assert_losses_and_norms_agree, assert_same_batches, recorded


def assert_state_is(run, source) -> None:
    """What a resumed run holds (asked of DeepSpeed) is what a checkpoint holds (read by us), bit for bit."""
    state = torch.load(run.hook_dir / "state.pt", weights_only=False)
    expected = source.training_state
    assert state["held"].keys() == expected.shapes.keys()
    for name, held in state["held"].items():
        for key, value in held.items():
            assert torch.equal(value, source.read(name, key)), (name, key)
    assert state["updates"] == {expected.updates}
    assert state["counters"] == {name: expected.model_states[name] for name in state["counters"]}


def assert_weights_are_deepspeeds(checkpoint) -> None:
    """Our reading of the master weights is DeepSpeed's own, which misses the frozen ones of stage 1."""
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
    ours = read_weights(checkpoint, "model")
    assert theirs
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    with torch.device("meta"):
        model = LatteFlowModel(LatteFlowConfig.from_pretrained(checkpoint.parent.parent / "model"))
    assert ours.keys() == model.state_dict().keys()


def test_ranks_and_stage_may_change_at_every_restart(command, one_rank, tmp_path):
    """The first change, of the stage alone, goes through DeepSpeed's own loading."""
    output = tmp_path / "run"
    batches, before = {}, None
    for ranks, zero, until in [
        (2, "zero1", 2),
        (2, "zero2", 3),
        (1, "zero2_offload", 5),
        (2, "zero3", 7),
        (1, "zero1", 8),
    ]:
        run = command.train(
            output_dir=output, ranks=ranks, zero=zero, max_steps=until, sample__every=0,
            hooks=("record_batches",) if before is None else ("record_batches", "dump_state"),
        )  # fmt: skip
        if before is not None:
            assert f"resumed from {before}" in run.finished.output
            assert_state_is(run, ZeroSource(before))
        before = run.checkpoint(until)
        assert_weights_are_deepspeeds(before)
        batches |= recorded(run)
    assert_same_batches(recorded(one_rank), batches)
    assert_losses_and_norms_agree(run, one_rank)
    for which in ("model", "ema"):
        ours, theirs = (read_weights(r.checkpoint(8), which) for r in (run, one_rank))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_ranks_that_do_not_divide_the_weights(command, tmp_path):
    """Three ranks: shards end in padding, which is no weight. Blend in bfloat16: frozen and tied weights too."""
    before = None
    for until, (ranks, zero) in enumerate([(3, "zero3"), (1, "zero1"), (3, "zero2"), (1, "zero2")], start=1):
        run = command.train(
            output_dir=tmp_path / "run", ranks=ranks, zero=zero, max_steps=until, sample__every=0,
            global_batch_size=36, precision="bf16", model__variant="blend",
            hooks=() if before is None else ("dump_state",),
        )  # fmt: skip
        if before is not None:
            assert_state_is(run, ZeroSource(before))
        before = run.checkpoint(until)
        assert_weights_are_deepspeeds(before)


def test_a_checkpoint_of_another_network_is_refused(command, tmp_path):
    """Its configuration was edited by hand; the shards would not fit."""
    run = command.train(ranks=2, max_steps=1, sample__every=0)
    config = run.output_dir / "config.yaml"
    config.write_text(config.read_text().replace("num_groups: 4", "num_groups: 2"))
    other = command.train(output_dir=run.output_dir, max_steps=2, sample__every=0, model__num_groups=2, code=2)
    assert f"error: {run.checkpoint(1)}: holds the weights of another network" in other.finished.output
