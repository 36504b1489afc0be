"""tools/convert_checkpoint.py on checkpoints of real runs: every format, bit for bit; what is refused leaves nothing."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from transformers import Qwen2VLForConditionalGeneration

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.tools import convert_checkpoint
from latte_flow.tools.conversion.convert import FORMATS as ALL_FORMATS
from latte_flow.tools.conversion.convert import convert
from latte_flow.tools.conversion.inspection import inspect
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.opening import load_pipeline, open_checkpoint, read_weights
from latte_flow.training.errors import UserError
from tests.integration import megatron_gpt_ranks
from tests.integration.launching import ROOT, environment, start_ranks
from tests.integration.megatron_gpt_ranks import assert_logits_agree

STEP = 2
RUNS = {
    "couple_zero1_1": {"ranks": 1, "zero": "zero1"},
    "couple_zero3_4": {"ranks": 4, "zero": "zero3", "max_steps": 1},
    "blend_zero2_2": {"ranks": 2, "zero": "zero2", "model__variant": "blend", "precision": "bf16"},
    "blend_zero3_2": {"ranks": 2, "zero": "zero3", "model__variant": "blend"},
    "blend_tensor_2": {"ranks": 2, "zero": "zero1", "model__variant": "blend", "tensor_parallel": 2},
}
FORMATS = tuple(name for name in ALL_FORMATS if name != "qwen3-vl")  # the VLM is a Qwen2-VL; see test_qwen3_vl.py
UNDERSTANDING_FORMATS = ("qwen2-vl", "megatron-gpt")
WEIGHT_FORMATS = tuple(name for name in FORMATS if name not in UNDERSTANDING_FORMATS)
OPTIONS = {"megatron-tp": {"tensor_parallel": 2}, "safetensors-sharded": {"max_shard_size": "150KB"}}


@pytest.fixture(scope="module")
def runs(command):
    """name -> a run of two steps (four ranks: of one)."""
    fields = {"max_steps": STEP, "checkpoint__every": STEP, "sample__every": 0}
    return {name: command.train(**(fields | changes)) for name, changes in RUNS.items()}


def checkpoint_of(runs, name: str) -> Path:
    return runs[name].checkpoint(RUNS[name].get("max_steps", STEP))


def canonical(weights: dict) -> dict:
    """Return weights without the second names of tied ones."""
    return {name: tensor for name, tensor in weights.items() if name != "vlm.lm_head.weight"}


def assert_holds(folder: Path, expected: dict, kind: str | None = None) -> None:
    source = open_weights(folder)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        read = source.read(name, kind)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize(("which", "formats"), [("ema", WEIGHT_FORMATS), ("model", WEIGHT_FORMATS[:1])])
@pytest.mark.parametrize("name", RUNS)
def test_every_format_holds_what_the_shards_hold(runs, tmp_path, name, which, formats):
    """The shards are read by formats/zero_shards.py, which test_elastic.py compares with DeepSpeed's own zero_to_fp32."""
    expected = canonical(read_weights(checkpoint_of(runs, name), which))
    for to in formats:
        folder = convert(runs[name].output_dir, tmp_path / to, to=to, weights=which, **OPTIONS.get(to, {}))
        assert_holds(folder, expected, which)
        assert {"config.json", "pipeline.json", "tokenizer", "config.yaml"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "which", "chain"),
    [("couple_zero1_1", "model", WEIGHT_FORMATS), ("blend_zero2_2", "ema", WEIGHT_FORMATS[::-1])],
)
def test_from_every_format_to_the_next(runs, tmp_path, name, which, chain):
    """tests/unit/test_weight_formats.py has all pairs. Frozen weights of Blend stay bfloat16."""
    expected = canonical(read_weights(checkpoint_of(runs, name), which))
    before = runs[name].output_dir
    for to in chain:
        before = convert(before, tmp_path / to, to=to, weights=which, **OPTIONS.get(to, {}))
        assert_holds(before, expected, which)
        assert (inspect(before)["step"], inspect(before)["weights"]) == (STEP, [which])


@pytest.mark.parametrize("name", ["couple_zero3_4", "blend_zero2_2", "blend_tensor_2"])
def test_a_universal_checkpoint_holds_the_optimizer_too(runs, tmp_path, name):
    """Through our converter twice, and through DeepSpeed's own, which knows nothing of the moving average."""
    original = open_checkpoint(checkpoint_of(runs, name)).source
    once = convert(checkpoint_of(runs, name), tmp_path / "once", to="deepspeed-universal")
    twice = convert(once, tmp_path / "twice", to="deepspeed-universal")
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    theirs = tmp_path / "theirs"
    ds_to_universal.main(
        Namespace(
            input_folder=str(checkpoint_of(runs, name)),
            output_folder=str(theirs),
            inject_missing_state=False,
            **arguments,
        )
    )
    for folder, kinds in (
        (twice, ("model", "ema", "exp_avg", "exp_avg_sq")),
        (theirs, ("model", "exp_avg", "exp_avg_sq")),
    ):
        source = open_weights(folder)
        assert source.kinds == kinds
        assert source.tensors == original.tensors
        for kind in kinds:
            for tensor in original.tensors:
                assert torch.equal(source.read(tensor, kind), original.read(tensor, kind)), (tensor, kind)
        state, before = source.training_state, original.training_state
        assert (state.updates, state.shapes) == (before.updates, before.shapes)
        counters = ("step", "global_steps", "global_samples", "skipped_steps", "meter", "health")
        assert [state.model_states[c] for c in counters] == [before.model_states[c] for c in counters]


@pytest.mark.parametrize("name", ["couple_zero1_1", "blend_zero2_2"])
def test_models_and_pipelines_load_every_exported_folder(runs, tmp_path, name):
    """They draw what the checkpoint draws."""
    prompts, options = [3, 1], {"num_steps": 4, "cfg_scale": 2.0, "seed": 5}
    from_shards = load_pipeline(runs[name].output_dir)
    expected = from_shards.generate(prompts, **options)
    for to in WEIGHT_FORMATS:
        folder = convert(runs[name].output_dir, tmp_path / to, to=to, **OPTIONS.get(to, {}))
        pipeline = load_pipeline(folder)
        models = [pipeline.model]
        if to.startswith("safetensors"):
            # Float32, though a Blend's frozen weights are bfloat16.
            models.append(LatteFlowModel.from_pretrained(folder))
        for model in models:
            for key, tensor in from_shards.model.state_dict().items():
                assert torch.equal(model.state_dict()[key], tensor), (to, key)
        assert (pipeline.generate(prompts, **options) == expected).all(), to
    trained = (
        load_pipeline(path, weights="model") for path in (runs[name].output_dir, tmp_path / "deepspeed-universal")
    )
    first, second = (pipeline.model.state_dict() for pipeline in trained)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], tensor) for key, tensor in from_shards.model.state_dict().items())


def test_no_output_tells_where_the_run_was(runs, tmp_path):
    """DeepSpeed's states among them; tests/unit/test_exports.py has folders of a VLM and an autoencoder."""
    run = runs["couple_zero1_1"].output_dir
    for to in FORMATS:
        folder = convert(run, tmp_path / to, to=to)
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            content = file.read_bytes()
            assert [p for p in (run.parent, tmp_path, ROOT) if str(p).encode() in content] == [], file


STOCK = """
import sys, torch, transformers
assert not any(name.split(".")[0] in ("latte_flow", "model", "training", "tools") for name in sys.modules)
for folder in sys.argv[1:]:
    vlm = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(vlm).__module__.startswith("transformers.")
    text = transformers.AutoTokenizer.from_pretrained(folder)("a question", return_tensors="pt")["input_ids"]
    pictures = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = vlm(**torch.load(folder + "/inputs.pt")).logits
    torch.save({"logits": logits, "text": text, "merge_size": pictures.merge_size}, folder + "/out.pt")
"""


def question_with_a_picture(config) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.tensor([[55, config.vision_start_token_id, *[config.image_token_id] * 4, 59, 61]])
    vision = config.vision_config
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=rng),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


def test_transformers_alone_answers_with_the_understanding_path(runs, tmp_path):
    """Stock Qwen2-VL folders: logits of a question with a picture, bit-identical, in a process without our code."""
    pipelines = {}
    for name in ("couple_zero1_1", "blend_zero2_2", "blend_tensor_2"):
        folder = convert(runs[name].output_dir, tmp_path / name, to="qwen2-vl", verify=True)
        pipelines[folder] = load_pipeline(runs[name].output_dir)
        torch.save(question_with_a_picture(pipelines[folder].backbone.config), folder / "inputs.pt")
    command = [sys.executable, "-c", STOCK, *map(str, pipelines)]
    variables = environment() | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for folder, pipeline in pipelines.items():
        theirs, config = torch.load(folder / "out.pt"), pipeline.backbone.config
        with torch.no_grad():
            assert torch.equal(theirs["logits"], pipeline.backbone(**question_with_a_picture(config)).logits)
        assert torch.equal(theirs["text"], pipeline.tokenizer("a question", return_tensors="pt")["input_ids"])
        assert theirs["merge_size"] == config.vision_config.spatial_merge_size


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("couple_zero1_1", 1), ("blend_zero2_2", 2), ("blend_tensor_2", 1)])
def test_megatron_core_answers_with_the_understanding_path(runs, tmp_path, name, ranks):
    vlm = load_pipeline(runs[name].output_dir).backbone
    folder = convert(runs[name].output_dir, tmp_path / "gpt", to="megatron-gpt", tensor_parallel=ranks, verify=True)
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    ids = torch.randint(0, vlm.config.text_config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_logits_agree(megatron_gpt_ranks.logits(folder, ids, tmp_path, ranks=ranks), vlm, ids)
    with pytest.raises(UserError, match="_extra_state' is a NoneType; accepted: a state dict"):
        convert(folder, tmp_path / "back", to="safetensors")


ENGINE = """
import json, sys, deepspeed, torch
from pathlib import Path
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.objectives.base import freeze_unreached
from latte_flow.training.objectives.flow_matching import FlowMatching
from latte_flow.training.optimizer import parameter_groups

folder, stage, output = sys.argv[1:]
vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None  # compiles an operator for a minute, which is not used
deepspeed.init_distributed("gloo")
model = LatteFlowModel(LatteFlowModel.config_class.from_pretrained(folder))
freeze_unreached(model, [FlowMatching])
config = {
    "train_batch_size": 2, "zero_optimization": {"stage": int(stage)}, "zero_allow_untested_optimizer": True,
    "checkpoint": {"load_universal": True},
}
optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
path, state = engine.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
assert path is not None
held = {
    name: {"model": safe_get_full_fp32_param(p)}
    | {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
    for name, p in engine.module.named_parameters() if p.requires_grad
}
if torch.distributed.get_rank() == 0:
    torch.save({"held": held, "steps": engine.global_steps, "meter": state["meter"]}, output)
"""


@pytest.mark.parametrize(("name", "stage"), [("blend_zero3_2", 2), ("couple_zero1_1", 1)])
def test_deepspeeds_own_engine_loads_our_universal_checkpoint(runs, tmp_path, name, stage):
    """Into stages 1 and 2; into stage 3 it loads only universal checkpoints that come from stage 3."""
    folder = convert(runs[name].output_dir, tmp_path / "universal", to="deepspeed-universal")
    (tmp_path / "script.py").write_text(ENGINE)
    arguments = [str(folder), str(stage), str(tmp_path / "held.pt")]
    finished = start_ranks(str(tmp_path / "script.py"), arguments, tmp_path / "log", ranks=2).wait()
    assert finished.code == 0, finished.output
    state, original = torch.load(tmp_path / "held.pt"), open_checkpoint(runs[name].output_dir).source
    assert state["held"].keys() == original.training_state.shapes.keys()
    for parameter, held in state["held"].items():
        for kind, tensor in held.items():
            assert torch.equal(tensor, original.read(parameter, kind)), (parameter, kind)
    assert state["steps"] == STEP
    assert state["meter"] == original.training_state.model_states["meter"]


def documented_commands() -> list[str]:
    lines = (ROOT / "docs" / "checkpoints.md").read_text().splitlines()
    lines = [line.strip() for line in lines if line.startswith("    python tools/convert_checkpoint.py")]
    return [re.split(r"  +", line)[0] for line in lines]


def test_the_documented_commands(runs, tmp_path, monkeypatch):
    """Every format is written by one of them; runs/X is a run, out/ a new folder."""
    commands = documented_commands()
    assert len(commands) == 11
    for command in commands:
        text = command.replace("runs/X", str(runs["couple_zero1_1"].output_dir)).replace("out/", f"{tmp_path}/out/")
        monkeypatch.setattr(sys, "argv", shlex.split(text)[1:])
        assert convert_checkpoint.run() == 0, command
    written = {
        path.name: json.loads((path / "export.json").read_text())["format"] for path in (tmp_path / "out").iterdir()
    }
    assert set(written.values()) == set(FORMATS)
    readable = [name for name, written_format in written.items() if written_format not in UNDERSTANDING_FORMATS]
    assert {open_weights(tmp_path / "out" / name).format for name in readable} == set(WEIGHT_FORMATS)


def test_the_command_line_ends_with_one_line_for_what_is_wrong(runs, tmp_path):
    arguments = [str(tmp_path / "nothing"), str(tmp_path / "out"), "--to", "pt"]
    done = start_ranks("tools/convert_checkpoint.py", arguments, tmp_path / "log").wait()
    assert done.code == 2
    assert re.search(r"^error: .*nothing: not found; accepted: a training output_dir", done.output, re.MULTILINE)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("name", "safe"), [("couple_zero3_4", True), ("blend_zero3_2", False)])
def test_what_deepspeeds_zero_to_fp32_writes_is_read(runs, tmp_path, name, safe):
    """Shards with an index, of safetensors or torch.save; tied weights under both their names."""
    checkpoint = checkpoint_of(runs, name)
    convert_zero_checkpoint_to_fp32_state_dict(
        str(checkpoint.parent), str(tmp_path), max_shard_size="150KB", safe_serialization=safe, tag=checkpoint.name
    )
    shutil.copy(runs[name].output_dir / "model" / "config.json", tmp_path)
    folder = convert(tmp_path, tmp_path.with_name(f"{tmp_path.name}_converted"), to="safetensors", verify=True)
    assert_holds(folder, canonical(read_weights(checkpoint, "model")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "out"], "OUTPUT and --to are needed"),
        (["run", "--to", "pt"], "OUTPUT and --to are needed"),
        (["run", "out", "--inspect"], "--inspect takes no OUTPUT"),
        (["run", "out", "--to", "pt", "--tensors"], "--tensors goes with --inspect"),
        (["run", "out", "--to", "pt", "--max_shard_size", "5GB"], "--max_shard_size goes with"),
        (["run", "out", "--to", "pt", "--step", "3", "--tag", "step_0000003"], "step, tag: got both"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
    assert convert_checkpoint.run() == 2
    assert re.fullmatch(rf"error: {words}.*\n", capsys.readouterr().err)


def test_types_and_the_step_are_chosen(runs, command, tmp_path):
    run = command.train(max_steps=4, checkpoint__every=2, sample__every=0)
    newest, first = (convert(run.output_dir, tmp_path / str(tag), to="pt", tag=tag) for tag in (None, "step_0000002"))
    assert (inspect(newest)["step"], inspect(first)["step"]) == (4, 2)
    assert_holds(first, read_weights(run.checkpoint(2), "ema"))
    half = convert(run.output_dir, tmp_path / "half", to="safetensors", dtype="bfloat16", verify=True)
    assert inspect(half)["parameters_by_dtype"].keys() == {"bfloat16"}
    assert_holds(half, {n: w.bfloat16() for n, w in read_weights(run.checkpoint(4), "ema").items()})
    assert load_pipeline(half, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"tag: .*step_0000003 not found; accepted: step_0000002, step_0000004"):
        convert(run.output_dir, tmp_path / "none", to="pt", tag="step_0000003")
    with pytest.raises(UserError, match=r"weights: .* holds ema; accepted: ema"):
        convert(half, tmp_path / "none", to="pt", weights="model")


def test_inspecting(runs, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert", str(runs["blend_zero2_2"].output_dir), "--inspect", "--tensors", "--step", str(STEP)]
    )
    assert convert_checkpoint.run() == 0
    said = json.loads(capsys.readouterr().out)
    weights = canonical(read_weights(checkpoint_of(runs, "blend_zero2_2"), "model"))
    assert said["format"] == "deepspeed-zero-2"
    assert (said["step"], said["world_size"], said["weights"]) == (STEP, 2, ["model", "ema"])
    assert said["optimizer_state"] == ["exp_avg", "exp_avg_sq", "ema"]
    assert said["num_tensors"] == len(weights)
    assert said["parameters"] == sum(w.numel() for w in weights.values())
    assert said["bytes"] == sum(w.nbytes for w in weights.values())
    assert said["parameters_by_dtype"].keys() == {"float32", "bfloat16"}
    assert said["tensors"]["image_io.0.head.bias"] == "float32 [1]"


class TestRefused:
    """Clean errors; neither the output nor a part of it is left."""

    def refuse(self, path, tmp_path, message, **options):
        output = tmp_path / "out" / "put"
        with pytest.raises(UserError, match=message):
            convert(path, output, **({"to": "safetensors"} | options))
        assert not list(tmp_path.glob("out/*"))

    @pytest.fixture
    def shards(self, runs, tmp_path):
        """Two ranks' shards without our manifest, as another program of DeepSpeed's writes them."""
        shutil.copytree(checkpoint_of(runs, "blend_zero2_2"), tmp_path / "shards")
        shutil.copytree(runs["blend_zero2_2"].output_dir / "model", tmp_path / "model")
        (tmp_path / "shards" / "manifest.json").unlink()
        return tmp_path / "shards"

    def test_shards_without_a_manifest_are_read(self, shards, runs, tmp_path):
        folder = convert(shards, tmp_path / "out", to="safetensors", weights="model")
        assert_holds(folder, canonical(read_weights(checkpoint_of(runs, "blend_zero2_2"), "model")))
        assert inspect(tmp_path, tag="shards")["step"] == STEP
        (tmp_path / "latest").write_text("shards")
        assert inspect(tmp_path)["step"] == STEP

    def test_a_missing_shard(self, shards, tmp_path):
        next(shards.glob("*rank_1_*optim_states.pt")).unlink()
        self.refuse(shards, tmp_path, "holds the shards of 1 ranks, but 2 ranks wrote it")

    def test_a_shard_of_another_step(self, shards, tmp_path, command):
        fields = {"max_steps": 1, "checkpoint__every": 1, "sample__every": 0}
        other = command.train(**fields, **RUNS["blend_zero2_2"])
        name = next(shards.glob("*rank_1_*optim_states.pt")).name
        shutil.copyfile(other.checkpoint(1) / name, shards / name)
        self.refuse(shards, tmp_path, r"its shards are of different updates: \[1, 2\]")

    @pytest.mark.parametrize("pattern", ["*model_states.pt", "*rank_1_*optim_states.pt"])
    def test_a_truncated_shard(self, shards, tmp_path, pattern):
        file = next(shards.glob(pattern))
        file.write_bytes(file.read_bytes()[:5000])
        self.refuse(shards, tmp_path, str(shards))

    def test_a_bit_of_our_own_checkpoint(self, runs, tmp_path):
        checkpoint = tmp_path / "run" / "checkpoints" / "step_0000002"
        shutil.copytree(checkpoint_of(runs, "couple_zero1_1"), checkpoint)
        file = next(checkpoint.glob("*optim_states.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self.refuse(checkpoint, tmp_path, f"damaged: {file.name} has another SHA-256")

    def test_an_export_that_was_cut_off(self, runs, tmp_path):
        folder = convert(runs["couple_zero1_1"].output_dir, tmp_path / "export", to="safetensors")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        self.refuse(folder, tmp_path, r"model.safetensors: has \d+ bytes instead of \d+")

    def test_the_weights_of_another_model(self, runs, tmp_path):
        blend, couple = (runs[name].output_dir for name in ("blend_zero2_2", "couple_zero1_1"))
        self.refuse(blend, tmp_path, r"weights: \d+ missing: layers", model_folder=couple / "model")
        stock = convert(couple, tmp_path / "stock", to="qwen2-vl")
        self.refuse(stock, tmp_path, "describes a qwen2_vl model; accepted: latte_flow")
        lonely = tmp_path / "lonely.pt"
        torch.save({"weight": torch.zeros(2)}, lonely)
        self.refuse(lonely, tmp_path, r"no config.json beside it; accepted: --model_folder")

    def test_code_in_a_shard(self, shards, tmp_path):
        marker = tmp_path / "executed"

        class Code:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        torch.save({"module": Code()}, next(shards.glob("*model_states.pt")))
        self.refuse(shards, tmp_path, "was not executed")
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"to": "megatron-tp", "tensor_parallel": 3}, "tensor_parallel: 3 does not divide num_attention_heads"),
            ({"tensor_parallel": 2}, "tensor_parallel: 2; accepted with --to safetensors: 1"),
            ({"to": "safetensors-sharded", "max_shard_size": "big"}, "max_shard_size: .*accepted: such as 5GB"),
            (
                {"to": "deepspeed-universal", "dtype": "float16"},
                "dtype: float16; accepted with an optimizer's state: float32",
            ),
        ],
    )
    def test_options_that_do_not_fit(self, runs, tmp_path, options, message):
        self.refuse(runs["couple_zero1_1"].output_dir, tmp_path, message, **options)

    def test_a_bit_of_an_export(self, runs, tmp_path):
        folder = convert(runs["couple_zero1_1"].output_dir, tmp_path / "export", to="pt")
        file = folder / "pytorch_model.bin"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self.refuse(folder, tmp_path, "pytorch_model.bin: has another SHA-256")

    def test_a_part_of_a_deepspeed_checkpoint(self, shards, tmp_path):
        for file in shards.iterdir():
            self.refuse(file, tmp_path, f"is part of a DeepSpeed checkpoint; accepted: its folder, {shards}")

    def test_weights_of_another_step_than_the_shards(self, shards, tmp_path, command):
        fields = {"max_steps": 1, "checkpoint__every": 1, "sample__every": 0}
        other = command.train(**fields, **RUNS["blend_zero2_2"])
        shutil.copy(next(other.checkpoint(1).glob("*model_states.pt")), shards)
        self.refuse(shards, tmp_path, "the optimizer has done 2 updates, the weights are of step 1, 0 of them skipped")

    def test_an_output_that_is_there(self, runs, tmp_path):
        run = runs["couple_zero1_1"].output_dir
        folder = convert(run, tmp_path / "out", to="deepspeed-universal")
        with pytest.raises(UserError, match="exists; accepted: a new folder, or --force"):
            convert(run, folder, to="dcp")
        convert(run, folder, to="dcp", force=True)
        assert open_weights(folder).format == "dcp"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        inside = convert(run, tmp_path / "above" / "inside", to="pt")
        for path, output, message in [
            (folder, folder, "holds the input"),
            (inside, inside.parent, "holds the input"),
            (run, run / "checkpoints" / "step_0000099", "is among the checkpoints of a run"),
            (folder, folder / "tokenizer" / "out", r"lies in .*, which is copied to the output"),
            (run, tmp_path / "model.safetensors", "looks like a file; accepted: a folder"),
            (run, runs["blend_zero2_2"].output_dir, "was not written by a conversion"),
        ]:
            with pytest.raises(UserError, match=message):
                convert(path, output, to="pt", force=True)
        (folder / "tokenizer" / "thesis.tex").write_text("...")
        with pytest.raises(UserError, match=r"holds files that no conversion wrote: tokenizer/thesis.tex"):
            convert(run, folder, to="pt", force=True)
        assert open_weights(folder).format == "dcp"

    def test_a_full_disk_and_a_kill_leave_what_there_was(self, runs, tmp_path, monkeypatch):
        run = runs["couple_zero1_1"].output_dir
        folder = convert(run, tmp_path / "out", to="pt")
        before = (folder / "pytorch_model.bin").read_bytes()
        rename = os.rename

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        def not_into_place(source, target):
            if Path(target) == folder and not folder.exists() and "-old" not in Path(source).name:
                full()  # when the earlier conversion has been moved away
            rename(source, target)

        for name, failing in (("convert.write_safetensors", full), ("output_folder.os.rename", not_into_place)):
            with monkeypatch.context() as patch:
                patch.setattr(f"latte_flow.tools.conversion.{name}", failing)
                with pytest.raises(UserError, match=r"out was not written: .*No space left on device"):
                    convert(run, folder, to="safetensors", force=True)
        with monkeypatch.context() as patch:
            patch.setattr("latte_flow.tools.conversion.convert.shutil.disk_usage", lambda path: Namespace(free=1000))
            with pytest.raises(UserError, match=r"output: it needs .* GiB, .* has .* GiB free"):
                convert(run, tmp_path / "new", to="safetensors")
        assert (folder / "pytorch_model.bin").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
        killed = tmp_path / f"killed.partial-{os.uname().nodename}-{dead}"
        for left in (killed, tmp_path / "killed.partial", tmp_path / "killed.old"):
            left.mkdir()
            (left / "model.safetensors").write_text("half")
        convert(run, tmp_path / "killed", to="pt")
        assert {path.name for path in tmp_path.iterdir()} == {"out", "killed", "killed.partial", "killed.old"}
        assert not (tmp_path / "killed" / "model.safetensors").exists()

    @pytest.mark.parametrize("name", ["couple_zero1_1", "blend_zero2_2"])
    def test_a_vlm_that_is_written_wrongly_is_not_kept(self, runs, tmp_path, monkeypatch, name):
        save = Qwen2VLForConditionalGeneration.save_pretrained

        def wrong(self, *args, **kwargs):
            self.model.visual.merger.ln_q.weight.data[0] += 1
            save(self, *args, **kwargs)

        monkeypatch.setattr(Qwen2VLForConditionalGeneration, "save_pretrained", wrong)
        self.refuse(
            runs[name].output_dir,
            tmp_path,
            "verify: model.visual.merger.ln_q.weight reads back differently",
            to="qwen2-vl",
            verify=True,
        )


PEAK = """
import re, sys, threading, time
from pathlib import Path
from latte_flow.tools.convert_checkpoint import run

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak, path, output = 0, *sys.argv[1:]
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def convert(name, size):
    sys.argv[1:] = [path, f"{output}/{name}", "--to", "safetensors-sharded", "--max_shard_size", size]
    assert run() == 0

convert("warm", "1MB")
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
convert("out", "16MB")
print("grew", peak - before)
"""


def test_one_shard_at_a_time_is_in_memory(command, tmp_path):
    """What a conversion needs beside memory-mapped files grows with the largest shard, not with the model (3 shards and more)."""
    run = command.train(
        ranks=2, zero="zero3", max_steps=1, sample__every=0, global_batch_size=8, vlm__tiny__hidden_size=256,
        vlm__tiny__intermediate_size=768, model__variant="blend",
    )  # fmt: skip
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    done = subprocess.run(
        [sys.executable, str(script), str(run.output_dir), str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    grew = int(done.stdout.split("grew")[1])
    assert len(shards) >= 3
    assert grew < 1.3 * max(shards) + 4 * 2**20
