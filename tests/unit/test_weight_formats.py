"""Weights in files of every format: written here and read by the format's own library, the other way round, and here again."""

import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.tools.conversion.writers import (
    write_dcp,
    write_megatron_dist,
    write_megatron_ranks,
    write_safetensors,
    write_torch_file,
    write_universal,
)
from latte_flow.training.checkpoint.formats.matching import MatchedSource, match_weights
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import TensorInfo, TrainingState, WeightSource
from tests.integration.launching import environment
from tests.tiny import make_model, make_vlm

WRITERS = {
    "safetensors": lambda folder, source: write_safetensors(
        folder, source, max_shard_size=None, metadata={"step": "7"}
    ),
    "safetensors-sharded": lambda folder, source: write_safetensors(
        folder, source, max_shard_size="100KB", metadata={"step": "7"}
    ),
    "pt": write_torch_file,
    "dcp": write_dcp,
    "deepspeed-universal": write_universal,
    "megatron-tp": lambda folder, source: write_megatron_ranks(folder, source, tensor_parallel=2),
    "megatron-dist": write_megatron_dist,
}
KEEPS_STEP = set(WRITERS) - {"pt", "dcp"}


class InMemory(WeightSource):
    """Tensors of a dict; with ``states`` a training's: name -> kind -> tensor."""

    format, step = "memory", 7

    def __init__(self, weights, states=None, updates=5):
        self.path, self._weights, self._states = None, weights, states or {}
        if states:
            keys = tuple(next(iter(states.values())))
            self.kinds = ("model", *keys)
            self.training_state = TrainingState(
                shapes={name: weights[name].shape for name in states},
                state_keys=keys,
                updates=updates,
                model_states={
                    "step": 7,
                    "global_steps": 7,
                    "skipped_steps": 7 - updates,
                    "shared_params": {},
                    "frozen_param_shapes": {},
                },
                optimizer={"param_groups": [{"lr": 0.1}], "ds_version": "0.19.8"},
            )

    @property
    def tensors(self):
        return {name: TensorInfo(t.shape, t.dtype) for name, t in self._weights.items()}

    def _read(self, name, kind):
        return self._states.get(name, {}).get(kind, self._weights[name])


def assert_same(source: WeightSource, expected: dict, kind=None) -> None:
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.tensors[name] == TensorInfo(tensor.shape, tensor.dtype), name
        assert torch.equal(source.read(name, kind), tensor), name


def assert_equal(theirs: dict, ours: dict) -> None:
    assert theirs.keys() == ours.keys()
    assert [name for name, w in ours.items() if not torch.equal(theirs[name], w)] == []


def read_all(path, model) -> None:
    source = MatchedSource(open_weights(path), model, "model")
    for name in source.tensors:
        source.read(name)


def weights_of(model) -> dict[str, torch.Tensor]:
    """Return the weights of a model, each once; some in bfloat16, as frozen ones are."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: w.bfloat16() if "visual" in name or "norm" in name else w for name, w in weights.items()}


@pytest.fixture(scope="module", params=["couple", "blend"])
def model(request):
    return make_model(make_vlm(4), variant=request.param, num_groups=2)


@pytest.fixture(scope="module")
def weights(model):
    return weights_of(model)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_read_and_recognised(weights, tmp_path, name):
    WRITERS[name](tmp_path, InMemory(weights))
    source = open_weights(tmp_path)
    assert source.format == name
    assert source.step == (7 if name in KEEPS_STEP else None)
    assert_same(source, weights)


@pytest.mark.parametrize("first", WRITERS)
def test_every_pair_of_formats(model, weights, tmp_path, first):
    """From one format to every other, its own too."""
    (tmp_path / first).mkdir()
    WRITERS[first](tmp_path / first, InMemory(weights))
    for second in WRITERS:
        folder = tmp_path / f"{first}_to_{second}"
        folder.mkdir()
        WRITERS[second](folder, MatchedSource(open_weights(tmp_path / first), model, "model"))
        assert_same(open_weights(folder), weights)


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    variant=st.sampled_from(["couple", "blend"]),
    sizes=st.sampled_from([(4, 1), (4, 2), (4, 4), (2, 1), (2, 2), (8, 4)]),
    group_io=st.sampled_from(["shared", "per_group"]),
    modulation=st.sampled_from(["four", "six"]),
    post_norm=st.booleans(),
    shared=st.sets(st.sampled_from(["q_proj", "o_proj", "mlp", "input_layernorm"])),
    chain=st.permutations(list(WRITERS)),
    seed=st.integers(0, 99),
)
def test_any_network_survives_a_chain_of_all_formats(
    tmp_path, variant, sizes, group_io, modulation, post_norm, shared, chain, seed
):
    layers, groups = sizes
    model = make_model(
        make_vlm(layers), variant=variant, num_groups=groups, group_io=group_io, modulation=modulation,
        post_norm=post_norm, shared_modules=sorted(shared), seed=seed,
    )  # fmt: skip
    weights = weights_of(model)
    source = InMemory(weights)
    for number, name in enumerate(chain):
        folder = tmp_path / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        WRITERS[name](folder, source)
        source = MatchedSource(open_weights(folder), model, "model")
    assert_same(source, weights)


def test_a_universal_checkpoint_holds_the_training(weights, tmp_path):
    """The optimizer's states of trained weights; frozen ones, in their own type, beside them."""
    trained = {name: w.float() for name, w in weights.items() if "visual" not in name}
    states = {n: {key: torch.randn_like(w) for key in ("ema", "exp_avg", "exp_avg_sq")} for n, w in trained.items()}
    original = InMemory(weights | trained, states)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, source in ((first, original), (second, None)):
        folder.mkdir()
        write_universal(folder, source or open_weights(first))
    read = open_weights(second)
    assert read.kinds == ("model", "ema", "exp_avg", "exp_avg_sq")
    for kind in read.kinds:
        for name in trained:
            assert torch.equal(read.read(name, kind), original.read(name, kind)), (name, kind)
    for name in weights.keys() - trained.keys():
        assert torch.equal(read.read(name), weights[name])
        assert read.tensors[name].dtype == torch.bfloat16
    state = read.training_state
    assert (state.updates, state.model_states["step"], state.optimizer["param_groups"]) == (5, 7, [{"lr": 0.1}])
    assert state.shapes == original.training_state.shapes


class TestOtherLibraries:
    """Each format's own library reads what is written here, and writes what is read here."""

    def test_safetensors(self, weights, tmp_path):
        WRITERS["safetensors"](tmp_path, InMemory(weights))
        theirs = load_file(tmp_path / "model.safetensors")
        assert_equal(theirs, weights)
        save_file(weights, tmp_path / "theirs.safetensors")
        assert_same(open_weights(tmp_path / "theirs.safetensors"), weights)

    @pytest.mark.parametrize("size", ["100KB", "5GB"])
    def test_transformers(self, model, tmp_path, size):
        """Shards with an index, and one file; tied weights are written once."""
        model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
        assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or size == "5GB"
        assert_same(open_weights(tmp_path / "theirs"), {n: p.detach() for n, p in model.named_parameters()})
        for name in ("safetensors-sharded", "pt"):
            folder = tmp_path / name
            folder.mkdir()
            WRITERS[name](folder, InMemory({n: p.detach() for n, p in model.named_parameters()}))
            model.config.save_pretrained(folder)
            loaded = super(LatteFlowModel, LatteFlowModel).from_pretrained.__func__(LatteFlowModel, folder)
            assert isinstance(loaded, PreTrainedModel)
            assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())

    @pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
    def test_torch_save(self, weights, tmp_path, wrapper):
        file = tmp_path / "any.pt"
        torch.save(weights if wrapper is None else {wrapper: weights, "step": 3}, file)
        source = open_weights(file)
        assert_same(source, weights)
        assert source.step == (None if wrapper is None else 3)
        WRITERS["pt"](tmp_path, InMemory(weights))
        theirs = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        assert_equal(theirs, weights)

    def test_torch_distributed_checkpoint(self, weights, tmp_path):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        ours.mkdir()
        WRITERS["dcp"](ours, InMemory(weights))
        state = {name: torch.zeros_like(w) for name, w in weights.items()}
        dcp.load(state, checkpoint_id=ours, no_dist=True)
        assert_equal(state, weights)
        dcp.save({**weights, "a note": "that is no tensor"}, checkpoint_id=theirs, no_dist=True)
        assert_same(open_weights(theirs), weights)

    @pytest.mark.slow
    def test_torch_distributed_checkpoint_of_two_ranks(self, tmp_path):
        """DTensors cut into rows of two ranks, the second with fewer, are put together."""
        run_script(TWO_RANKS, str(tmp_path / "dcp"))
        source = open_weights(tmp_path / "dcp")
        assert torch.equal(source.read("w"), torch.arange(21.0).view(7, 3))
        assert torch.equal(source.read("b"), torch.ones(2))

    @pytest.mark.slow
    def test_megatron_dist_checkpointing(self, tmp_path):
        """megatron.core loads ours; its own save, which asks CUDA for the device, is told the CPU."""
        weights = {"layers.0.k": torch.randn(6, 4), "b": torch.randn(5).bfloat16()}
        ours = tmp_path / "ours"
        ours.mkdir()
        WRITERS["megatron-dist"](ours, InMemory(weights))
        torch.save(weights, tmp_path / "weights.pt")
        run_script(MEGATRON, str(tmp_path))
        theirs = open_weights(tmp_path / "theirs")
        assert (theirs.format, theirs.step) == ("megatron-dist", 9)
        assert_same(theirs, weights)


TWO_RANKS = """
import sys, torch, torch.multiprocessing as mp, torch.distributed as dist, torch.distributed.checkpoint as dcp, os
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def work(rank, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    dcp.save({"w": distribute_tensor(torch.arange(21.0).view(7, 3), mesh, [Shard(0)]), "b": torch.ones(2)}, checkpoint_id=folder)
    dist.destroy_process_group()

if __name__ == "__main__":
    from tests.integration.launching import free_port
    mp.spawn(work, (sys.argv[1], free_port()), nprocs=2)
"""

MEGATRON = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path

def main(folder):
    from tests.integration.launching import free_port
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    parallel_state.initialize_model_parallel(1)
    weights = torch.load(folder / "weights.pt", weights_only=True)
    empty = {name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(w)) for name, w in weights.items()}
    loaded = dist_checkpointing.load(empty, str(folder / "ours"))
    assert loaded.pop("iteration") == 7
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], w) for name, w in weights.items())
    torch.cuda.synchronize, torch.cuda.current_device = lambda *_: None, lambda: "cpu"
    (folder / "theirs").mkdir()
    sharded = {name: ShardedTensor.from_rank_offsets(name, w) for name, w in weights.items()}
    dist_checkpointing.save({"iteration": 9, **sharded}, str(folder / "theirs"))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


def run_script(text: str, argument: str) -> None:
    """Run a script in a process of its own; megatron's writer starts others, which import it again."""
    script = Path(argument).parent / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), argument], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Marker:
    """Code in a pickle: leaves a file behind when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pt", "dcp", "megatron-tp", "megatron-dist", "deepspeed-universal"])
def test_code_in_any_file_is_not_executed(model, weights, tmp_path, name):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        WRITERS[name](folder, InMemory(weights))
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".pt", ".bin") or p.name == ".metadata")[:4]
        if number == len(files):
            break
        marker, file = tmp_path / "executed", files[number]
        if file.name == ".metadata":
            file.write_bytes(pickle.dumps(Marker(marker)))
        else:
            torch.save({"model": Marker(marker)}, file)
        with pytest.raises(ValueError, match=r"was not executed|is not a weight"):
            read_all(folder, model)
        assert not marker.exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("how", ["truncated", "emptied", "removed"])
def test_a_damaged_file_is_an_error_that_names_it(model, weights, tmp_path, name, how):
    intact, folder = tmp_path / "intact", tmp_path / "damaged"
    intact.mkdir()
    WRITERS[name](intact, InMemory(weights))
    files = sorted(path.relative_to(intact) for path in intact.rglob("*") if path.is_file())
    for file in {path.suffix + path.name[:6]: path for path in files}.values():  # one of each kind is enough
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact, folder)
        content = (folder / file).read_bytes()
        if how == "removed":
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
        with pytest.raises(ValueError, match=str(folder)):
            read_all(folder, model)


class TestMixedSteps:
    """Files of several steps in one folder."""

    def write(self, tmp_path, name, weights, step):
        folder = tmp_path / f"{name}_{step}"
        folder.mkdir()
        source = InMemory(
            weights, {"layers.0.k": {"exp_avg": weights["layers.0.k"]}} if name == "universal" else None, step
        )
        source.step = step
        if name == "sharded":
            write_safetensors(folder, source, max_shard_size="1KB", metadata={"step": str(step)})
        elif name == "universal":
            source.training_state.shapes["b"] = weights["b"].shape
            write_universal(folder, source)
        else:
            write_megatron_ranks(folder, source, tensor_parallel=2)
        return folder

    @pytest.mark.parametrize(
        ("name", "file", "message"),
        [
            (
                "sharded",
                "model-00002-of-00002.safetensors",
                "different steps: .*00001.* of step 1, .*00002.* of step 2",
            ),
            ("megatron", "iter_0000001/mp_rank_01/model_optim_rng.pt", r"different steps: \['1', '2'\]"),
            ("universal", "zero/b/step.pt", "layers.0.k is of update 1, b of update 2"),
        ],
    )
    def test_are_refused(self, tmp_path, name, file, message):
        weights = {"layers.0.k": torch.ones(16, 16), "b": torch.zeros(16, 16)}
        one, two = (self.write(tmp_path, name, weights, step) for step in (1, 2))
        shutil.copyfile(two / file.replace("iter_0000001", "iter_0000002"), one / file)
        with pytest.raises(ValueError, match=message):
            open_weights(one)


class TestRefused:
    def test_a_missing_rank(self, weights, tmp_path):
        WRITERS["megatron-tp"](tmp_path, InMemory(weights))
        folder = tmp_path / "iter_0000007"
        shutil.rmtree(folder / "mp_rank_01")
        with pytest.raises(ValueError, match="holds 1 ranks' parts, but they were written by 2 ranks"):
            open_weights(tmp_path)
        (folder / "mp_rank_00").rename(folder / "mp_rank_01")
        with pytest.raises(ValueError, match=r"parts of ranks \[1\]; mp_rank_00 is missing"):
            open_weights(folder)

    def test_ranks_whose_parts_have_other_shapes_or_types(self, weights, tmp_path):
        WRITERS["megatron-tp"](tmp_path, InMemory(weights))
        file = tmp_path / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=True)
        name = "layers.0.mlp.gate_proj.weight"
        for changed in (content["model"][name][:3], content["model"][name].half()):
            torch.save(content | {"model": content["model"] | {name: changed}}, file)
            with pytest.raises(ValueError, match=rf"{name} is .* in the part of rank 1, .* in that of rank 0"):
                open_weights(tmp_path)

    def test_a_kind_that_is_not_there(self, weights, tmp_path):
        for name, write in WRITERS.items():
            folder = tmp_path / name
            folder.mkdir()
            write(folder, InMemory(weights))
            with pytest.raises(ValueError, match="holds no exp_avg; accepted: model"):
                open_weights(folder).read("image_io.0.head.weight", "exp_avg")

    def test_a_safetensors_file_knows_its_kind_anywhere(self, weights, tmp_path):
        write_safetensors(tmp_path, InMemory(weights), max_shard_size=None, metadata={"weights": "ema", "step": "3"})
        (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        source = open_weights(tmp_path)
        assert (source.kinds, source.step) == (("ema",), 3)

    def test_torch_shards_of_several_steps(self, weights, tmp_path):
        names = sorted(weights)
        for number, part in enumerate((names[::2], names[1::2]), start=3):
            torch.save({"model": {n: weights[n] for n in part}, "step": number}, tmp_path / f"{number}.bin")
        index = {"weight_map": {n: f"{3 + i % 2}.bin" for i, n in enumerate(names)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"its shards are of different steps: \['3', '4'\]"):
            open_weights(tmp_path)

    def test_a_number_of_ranks_that_does_not_divide_a_tensor(self, weights, tmp_path):
        with pytest.raises(ValueError, match=r"tensor_parallel: 3 does not divide dimension 0 of .*q_proj"):
            write_megatron_ranks(tmp_path, InMemory(weights), tensor_parallel=3)

    def test_unknown_missing_and_misshapen_weights_are_named(self, model, weights):
        name = "image_io.0.head.weight"
        for changed, message in [
            (weights | {"image_io.0.haed.weight": weights[name]}, "1 unknown: image_io.0.haed.weight"),
            ({n: w for n, w in weights.items() if n != name}, f"1 missing: {name}"),
            (weights | {name: torch.zeros(5, 64)}, rf"1 of another shape: {name} \[5, 64\] instead of \[3, 64\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                match_weights(model, changed)

    def test_tied_weights_that_differ(self, tmp_path):
        model = make_model(make_vlm(4), variant="blend")
        weights = weights_of(model)
        head, embedding = "vlm.lm_head.weight", "vlm.model.language_model.embed_tokens.weight"
        both = MatchedSource(InMemory(weights | {head: weights[embedding]}), model, "model")
        assert head not in both.tensors
        assert torch.equal(both.read(embedding), weights[embedding])
        with pytest.raises(ValueError, match=f"{embedding} and {head} differ, but {embedding} is tied"):
            MatchedSource(InMemory(weights | {head: weights[embedding] + 1}), model, "model")

    def test_an_index_or_a_metadata_that_leads_out_of_its_folder(self, weights, tmp_path):
        save_file(weights, tmp_path / "outside.safetensors")
        folder = tmp_path / "in"
        folder.mkdir()
        index = {"weight_map": dict.fromkeys(weights, "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"accepted: a file in the folder of the index"):
            open_weights(folder)
        ours = tmp_path / "dcp"
        ours.mkdir()
        WRITERS["dcp"](ours, InMemory(weights))
        metadata = (ours / ".metadata").read_bytes()
        (ours / ".metadata").write_bytes(metadata.replace(b"\x0c__0_0.distcp", b"\x0c../../passwd"))
        with pytest.raises(ValueError, match=r"names the file '../../passwd'"):
            open_weights(ours)

    def test_several_formats_in_one_folder_and_none(self, weights, tmp_path):
        with pytest.raises(ValueError, match="holds no weights in a known format; accepted: a training output_dir"):
            open_weights(tmp_path)
        for name in ("safetensors", "pt"):
            WRITERS[name](tmp_path, InMemory(weights))
        with pytest.raises(ValueError, match=r"weights in several formats \(Safetensors, TorchFile\)"):
            open_weights(tmp_path)
        with pytest.raises(ValueError, match="nowhere: not found"):
            open_weights(tmp_path / "nowhere")
