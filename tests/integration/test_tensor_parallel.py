"""Tensor parallelism trains what one rank trains: the same gradients, losses and weights to rounding, over megatron-core."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import partition_dim, take_part
from latte_flow.training.checkpoint.formats.zero_shards import ZeroShards
from latte_flow.training.checkpoint.io import safe_unpickling
from latte_flow.training.checkpoint.opening import read_weights
from latte_flow.training.configs.fields import Assumptions
from latte_flow.training.configs.saved import load_config
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.errors import UserError
from tests.integration import tensor_parallel_ranks
from tests.integration.launching import SERVER, column, metrics
from tests.integration.launching import run as run_program
from tests.integration.test_training import assert_losses_and_norms_agree, assert_weights_equal

STEPS = 6
WITHOUT_GRIDS = {"sample__every": 0, "max_steps": STEPS, "checkpoint__every": STEPS}


def in_ranks(function: str, tmp_path, world_size: int = tensor_parallel_ranks.SIZE) -> None:
    """Call a function of tensor_parallel_ranks.py in as many processes."""
    arguments = (world_size, str(tmp_path / "store"), function)
    processes = [
        SERVER.Process(target=tensor_parallel_ranks.run, args=(rank, *arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size


def test_every_gradient_is_that_of_the_whole_network(tmp_path):
    in_ranks("compare_with_the_whole", tmp_path)


def test_a_frozen_vlm_is_split_in_a_copy(tmp_path):
    in_ranks("frozen_vlm_stays_whole", tmp_path)


def assert_states_agree(run, reference, step: int, *, rtol: float, share: float) -> None:
    """Master weights, moments and average, joined, are those of the reference, up to a share of each tensor's largest number.

    What tensor-parallel ranks all hold is the same bits on each.
    """
    with safe_unpickling(run.checkpoint(step)):
        ours, theirs = ZeroShards(run.checkpoint(step)), ZeroShards(reference.checkpoint(step))
        assert theirs.tensor_parallel == 1 < ours.tensor_parallel
        assert ours.shapes == theirs.shapes
        for name in ours.shapes:
            for key in (None, *theirs.state_keys):
                expected = theirs.read(name, key)
                if partition_dim(name) is None:
                    first, *others = ours.read_parts(name, key)
                    assert all(torch.equal(first, other) for other in others), (name, key)
                torch.testing.assert_close(
                    ours.read(name, key),
                    expected,
                    rtol=rtol,
                    atol=share * float(expected.detach().abs().max()) + 1e-12,
                    msg=lambda m, what=(name, key): f"{what}: {m}",
                )


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="couple"),
        pytest.param({"model__context_projection": "vlm", "model__group_io": "per_group"}, id="couple-vlm-per-group"),
        pytest.param({"model__variant": "blend", "model__group_io": "per_group"}, id="blend-per-group"),
        pytest.param({"model__variant": "blend", "model__context_projection": "vlm"}, id="blend-vlm"),
    ],
)
def test_two_tensor_parallel_ranks_train_what_one_rank_trains(command, fields):
    reference = command.train(**WITHOUT_GRIDS, **fields)
    run = command.train(ranks=2, tensor_parallel=2, **WITHOUT_GRIDS, **fields)
    assert "1 sets of 2 tensor-parallel ranks" in run.finished.output
    assert_losses_and_norms_agree(run, reference, rel=1e-4)
    assert_states_agree(run, reference, STEPS, rtol=1e-3, share=1e-3)


def test_four_tensor_parallel_ranks_train_what_one_rank_trains(command):
    """One query head and one key head a rank."""
    fields = {"vlm__tiny__num_key_value_heads": 4, "max_steps": 4, "sample__every": 0}
    reference = command.train(**fields)
    run = command.train(ranks=4, tensor_parallel=4, **fields)
    assert_losses_and_norms_agree(run, reference, rel=1e-4)
    assert_states_agree(run, reference, 4, rtol=1e-3, share=1e-3)


def test_in_bfloat16_they_agree_to_its_rounding(command):
    fields = {"precision": "bf16", "model__variant": "blend", **WITHOUT_GRIDS}
    reference = command.train(**fields)
    run = command.train(ranks=2, tensor_parallel=2, **fields)
    assert column(run.output_dir, "loss") == pytest.approx(column(reference.output_dir, "loss"), rel=2**-7)
    ours, theirs = (read_weights(r.checkpoint(STEPS), "model") for r in (run, reference))
    assert ours.keys() == theirs.keys()
    recomputed = command.train(ranks=2, tensor_parallel=2, activation_checkpointing=True, **fields)
    assert_losses_and_norms_agree(recomputed, run, rel=0)


# Data parallel x tensor parallel, resuming


def batches(run) -> dict[int, list[dict]]:
    """Return what the hook record_batches saw, by rank."""
    return {int(file.stem[5:]): torch.load(file, weights_only=False) for file in run.hook_dir.glob("rank_*.pt")}


def assert_state_is_that_of(checkpoint, run, tensor_parallel: int) -> None:
    """What rank 0 and its data-parallel fellows hold after a start is a part of what the checkpoint's shards hold, bit by bit."""
    state = torch.load(run.hook_dir / "state.pt", weights_only=False)
    with safe_unpickling(checkpoint):
        shards = ZeroShards(checkpoint)
        assert state["held"].keys() == shards.shapes.keys()
        for name, held in state["held"].items():
            for key, value in held.items():
                assert torch.equal(value, take_part(name, shards.read(name, key), 0, tensor_parallel)), (name, key)
        assert state["updates"] == {shards.updates}
        assert state["counters"] == {name: shards.model_states[name] for name in state["counters"]}


FOUR_RANKS = {"ranks": 4, "tensor_parallel": 2, "zero": "zero1", "sample__num_images": 7}


@pytest.fixture(scope="module")
def two_by_two(command):
    """Eight steps on two sets of two tensor-parallel ranks, a checkpoint every four."""
    return command.train(**FOUR_RANKS, hooks=("record_batches",))


def test_two_sets_of_two_ranks_train_what_one_rank_trains(command, two_by_two):
    reference = command.train(sample__num_images=7, hooks=("record_batches",))
    assert_losses_and_norms_agree(two_by_two, reference, rel=1e-4)
    assert_states_agree(two_by_two, reference, 8, rtol=1e-3, share=1e-3)
    seen, whole = batches(two_by_two), batches(reference)[0]
    for step in range(8):
        mine = [seen[rank][step] for rank in range(4)]
        for first, second in ((0, 1), (2, 3)):  # a set trains the same samples with the same noise
            for name in ("sample_indices", "noise", "timesteps", "context_rows", "images", "losses"):
                assert torch.equal(mine[first][name], mine[second][name]), name
        indices = torch.cat([mine[0]["sample_indices"], mine[2]["sample_indices"]])
        assert torch.equal(indices.sort().values, whole[step]["sample_indices"].sort().values)
    ours, theirs = (
        np.asarray(Image.open(r.output_dir / "samples" / "step_0000008.png")) for r in (two_by_two, reference)
    )
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_a_stopped_run_goes_on_to_the_bit(command, two_by_two):
    half = command.train(**FOUR_RANKS, max_steps=4)
    run = command.train(**FOUR_RANKS, output_dir=half.output_dir)
    assert f"resumed from {half.checkpoint(4)}" in run.finished.output
    assert "resharded" not in run.finished.output
    for name in ("loss", "grad_norm", "grad_norm_group_0", "loss_group_3"):
        assert column(run.output_dir, name) == column(two_by_two.output_dir, name)
    assert_weights_equal(run, two_by_two, 8)


CHANGES = [(2, 2, "zero2"), (1, 1, "zero1"), (4, 2, "zero2"), (2, 1, "zero3"), (2, 2, "zero1"), (2, 2, "zero2_offload")]
"""Ranks, tensor_parallel and ZeRO of each start."""


@pytest.mark.parametrize(("variant", "changes"), [("couple", CHANGES), ("blend", CHANGES[-3:])])
def test_tensor_parallel_may_change_at_every_restart(command, tmp_path, variant, changes):
    """The same state at every change, and losses that agree to rounding. The last change is DeepSpeed's own to load."""
    fields = {"model__variant": variant, "sample__every": 0}
    reference = command.train(max_steps=len(changes), **fields)
    before, tensor_before = None, 1
    for until, (ranks, tensor_parallel, zero) in enumerate(changes, start=1):
        run = command.train(
            output_dir=tmp_path / "run", ranks=ranks, tensor_parallel=tensor_parallel, zero=zero, max_steps=until,
            hooks=() if before is None else ("dump_state",), **fields,
        )  # fmt: skip
        if before is not None:
            assert f"resumed from {before}" in run.finished.output
            changed = f"tensor_parallel {tensor_parallel} instead of {tensor_before}"
            assert (changed in run.finished.output) == (tensor_parallel != tensor_before)
            assert_state_is_that_of(before, run, tensor_parallel)
        before, tensor_before = run.checkpoint(until), tensor_parallel
    assert_losses_and_norms_agree(run, reference, rel=1e-4)
    assert_states_agree(run, reference, len(changes), rtol=1e-3, share=1e-3)


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((2, 1), (4, 2))])
def test_a_mean_loss_counts_every_sample_once_over_a_change(command, before, after):
    """Killed before a report, resumed with (ranks, tensor_parallel): the report is of all steps since the one before."""
    fields = {"sample__every": 0, "checkpoint__every": 1, "logging__every": 3, "max_steps": 3}
    reference = command.train(**fields)
    killed = command.train(
        ranks=before[0], tensor_parallel=before[1], hooks=("die_after_step",), variables={"DIE_AFTER_STEP": "3"}, code=9,
        **fields,
    )  # fmt: skip
    run = command.train(output_dir=killed.output_dir, ranks=after[0], tensor_parallel=after[1], **fields)
    assert f"resumed from {run.checkpoint(2)}" in run.finished.output
    assert_losses_and_norms_agree(run, reference, rel=1e-4)


def test_samples_are_drawn_without_tensor_parallelism(command, two_by_two):
    """tools/sample.py reads the parts as one network."""
    names = LatteFlowModel(LatteFlowConfig.from_pretrained(two_by_two.output_dir / "model")).state_dict().keys()
    weights = read_weights(two_by_two.checkpoint(8), "ema")
    assert weights.keys() == names
    drawn = command.sample(two_by_two.output_dir, "--num_images", "4")
    assert len(list(drawn.output_dir.glob("0*.png"))) == 4


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("*mp_rank_01_*", "holds the shards of 2 ranks, but 4 ranks wrote it"),
        ("*mp_rank_01_optim*", r"holds weights of tensor-parallel ranks \[0, 1\] and shards of \[0\]"),
        ("zero_pp_rank_1_mp_rank_01_*", "holds the shards of 3 ranks, but 4 ranks wrote it"),
    ],
)
def test_a_part_that_is_missing_is_an_error(two_by_two, tmp_path, left_out, message):
    folder = shutil.copytree(two_by_two.checkpoint(8), tmp_path / "copy", ignore=shutil.ignore_patterns(left_out))
    with pytest.raises(ValueError, match=message):
        read_weights(folder, "model")


def test_deepspeeds_own_conversion_joins_the_parts(two_by_two, tmp_path):
    """ds_to_universal, which knows of our split only what the checkpoint says of it."""
    checkpoint, folder = two_by_two.checkpoint(8), tmp_path / "universal"
    script = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    finished = run_program(
        [*script, "--num_merge_workers", "1", "--input_folder", checkpoint, "--output_folder", folder]
    )
    assert finished.code == 0, finished.output
    with safe_unpickling(checkpoint):
        shards = ZeroShards(checkpoint)
        for name in shards.shapes:
            for file, key in (("fp32", None), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                param = torch.load(folder / "zero" / name / f"{file}.pt", weights_only=True)["param"]
                assert torch.equal(param, shards.read(name, key)), (name, key)


# What else a run does


@pytest.mark.parametrize("projection", ["generation", "vlm"])
def test_the_context_is_the_same_however_much_of_it_is_kept(command, projection):
    """Each rank keeps its own heads' keys and values, so of ``vlm`` twice as many prompts fit."""
    fields = {"ranks": 2, "tensor_parallel": 2, "micro_batch_size": 4, "sample__num_images": 4, "global_batch_size": 8}
    fields |= {"model__context_projection": projection, "max_steps": 3, "sample__every": 2, "checkpoint__every": 3}
    kept = command.train(**fields)
    assert f"tokens, {0.0156 if projection == 'generation' else 0.00781} MiB each" in kept.finished.output
    for limits in ({"vlm__context_cache": "none"}, {"vlm__context_cache": "lru", "vlm__context_cache_gib": 1.5e-4}):
        run = command.train(**fields, **limits)
        assert column(run.output_dir, "loss") == column(kept.output_dir, "loss")
        assert_weights_equal(run, kept, 3)


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_and_its_samples_are_named_once(command):
    run = command.train(
        **(FOUR_RANKS | {"zero": "zero2", "checkpoint__asynchronous": "true"}),
        precision="bf16", hooks=("poison",), variables={"POISON": "70 71 230 230"},
    )  # fmt: skip
    entries = metrics(run.output_dir)
    assert column(run.output_dir, "skipped_steps") == [0, 0, 1, 1, 1, 1, 1, 2]
    assert entries[2]["skipped"] == [{"step": 3, "samples": [64, 95], "nonfinite_loss": [70, 71]}]
    assert all(torch.isfinite(tensor).all() for tensor in read_weights(run.checkpoint(8), "model").values())


@pytest.mark.parametrize("fields", [{}, {"model__context_projection": "vlm"}])
def test_a_rank_holds_the_bytes_that_the_dry_run_counts(command, fields):
    run = command.train(
        **FOUR_RANKS, precision="bf16", max_steps=2, sample__every=0, hooks=("measure_memory",), **fields
    )
    config = load_config(run.output_dir / "config.yaml")
    result = dry_run(config, Assumptions(gpus=4))
    for rank in range(4):
        held = json.loads((run.hook_dir / f"memory_{rank}.json").read_text())
        assert held == pytest.approx({name: result.memory[name] for name in held}, rel=2e-3)
    assert "4 GPUs, tensor_parallel 2" in format_table(config, result, Assumptions(gpus=4))
    with pytest.raises(UserError, match="tensor_parallel: 2 does not divide the 3 ranks; accepted: 1, 3"):
        dry_run(config, Assumptions(gpus=3))


# What is refused


@pytest.mark.parametrize(
    ("ranks", "fields", "message"),
    [
        (1, {"tensor_parallel": 2}, "tensor_parallel: 2 does not divide the 1 ranks; accepted: 1"),
        (
            2,
            {"tensor_parallel": 2, "vlm__tiny__num_key_value_heads": 1},
            "tensor_parallel: 2 does not divide num_attention_heads 4, num_key_value_heads 1, intermediate_size 64; accepted: 1",
        ),
        (2, {"tensor_parallel": 2, "zero": "zero3"}, "zero3.json; accepted: stages 1 and 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(command, ranks, fields, message):
    run = command.train(ranks=ranks, code=2, **fields)
    errors = [line for line in run.finished.output.splitlines() if line.startswith("error: ")]
    assert errors, run.finished.output
    assert all(message in line for line in errors)
    assert "Traceback" not in run.finished.output
    assert not run.output_dir.exists()
