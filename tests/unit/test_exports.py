"""What a conversion puts into its output, and which inputs it refuses: files, links, local paths, NaN, steps."""

import json
import math
import os
import shutil

import pytest
import torch

from latte_flow.model.backbone import fingerprint, load_vlm
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.tiny_vlm import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.tools.conversion.convert import FORMATS, convert
from latte_flow.tools.conversion.writers import write_safetensors, write_torch_file, write_universal
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.model_folder import PipelineConfig, save_components
from latte_flow.training.checkpoint.opening import load_pipeline
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.configs.saved import load_config, save_config
from latte_flow.training.errors import UserError
from latte_flow.training.run_folder import find_origin
from tests.tiny import randomise
from tests.tiny_models import save_tiny_dc_ae
from tests.unit.test_weight_formats import InMemory

HOME = "home_of_alice"
NAME = "image_io.0.head.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A universal checkpoint with everything beside it, its VLM and autoencoder in folders of somebody's machine."""
    home = tmp_path_factory.mktemp("machine") / HOME
    tokenizer = build_tiny_tokenizer(["a red square"])
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15)
    build_tiny_vlm(config, seed=0).save_pretrained(home / "qwen")
    tokenizer.save_pretrained(home / "qwen")
    save_tiny_dc_ae(home / "autoencoder")
    vlm, tokenizer = load_vlm(home / "qwen")
    network = LatteFlowConfig(vlm_config=vlm.config, latent_channels=8, latent_size=(4, 4), num_groups=2)
    model = randomise(LatteFlowModel.from_vlm(vlm, network), std=0.05)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    states = {name: dict.fromkeys(("ema", "exp_avg", "exp_avg_sq"), tensor) for name, tensor in weights.items()}
    source = InMemory(weights, states)
    source.training_state.model_states["ds_config"] = {
        "zero_optimization": {"offload_param": {"nvme_path": str(home / "swap")}}
    }
    folder = home / "checkpoint"
    folder.mkdir()
    write_universal(folder, source)
    settings = PipelineConfig(
        resolution=16,
        image_channels=3,
        prompt_template="{}",
        null_prompt="",
        codec={"kind": "dc-ae", "path": str(home / "autoencoder")},
        vlm_path=str(home / "qwen"),
        vlm_fingerprint=fingerprint(home / "qwen"),
    )
    processor = build_tiny_image_processor(config)
    save_components(folder, network, settings, tokenizer=tokenizer, image_processor=processor, vlm=None)
    # What older versions of transformers left in files.
    for file in (folder / "config.json", folder / "tokenizer" / "tokenizer_config.json"):
        content = json.loads(file.read_text()) | {"_name_or_path": str(home), "special_tokens_map_file": str(home)}
        file.write_text(json.dumps(content))
    fields = {"output_dir": home / "run", "vlm.path": home / "qwen", "codec.path": home / "autoencoder"}
    fields |= {"data.path": home / "pictures", "data.class_names": home / "names.txt", "init_from": home / "start"}
    arguments = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    save_config(parse_config(arguments), folder / "config.yaml")
    return home


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "qwen3-vl"])  # the VLM is a Qwen2-VL
def test_an_export_holds_no_absolute_path(home, tmp_path, to):
    folder = convert(home / "checkpoint", tmp_path / "secret" / "out", to=to)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        # By their parts: pickled paths are tuples of these.
        assert [word for word in (HOME, "secret", tmp_path.name) if word.encode() in content] == [], file


def test_an_export_finds_its_vlm_and_autoencoder_beside_it_or_asks_for_them(home, tmp_path):
    folder = convert(home / "checkpoint", tmp_path / "out", to="safetensors")
    with pytest.raises(
        UserError, match=rf"codec\.path: cannot load {tmp_path}/autoencoder: not found; .*\(codec_path\)"
    ):
        load_pipeline(folder)
    shutil.copytree(home / "autoencoder", tmp_path / "autoencoder")
    with pytest.raises(UserError, match=rf"vlm\.path: cannot load {tmp_path}/qwen: not found; .*\(vlm_path\)"):
        load_pipeline(folder)
    shutil.copytree(home / "qwen", tmp_path / "qwen")
    options = {"num_steps": 4, "cfg_scale": 2.0}
    expected = load_pipeline(home / "checkpoint").generate(["a red square"], **options)
    for arguments in ({}, {"vlm_path": home / "qwen", "codec_path": home / "autoencoder"}):
        assert (load_pipeline(folder, **arguments).generate(["a red square"], **options) == expected).all()
    config = tmp_path / "qwen" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"comment": "another one"}))
    with pytest.raises(UserError, match=r"vlm\.path: .* is not the VLM that this model was trained with"):
        load_pipeline(folder)


def test_an_export_becomes_a_qwen2_vl_with_the_vlm_that_is_given(home, tmp_path):
    folder = convert(home / "checkpoint", tmp_path / "out", to="safetensors")
    with pytest.raises(UserError, match=r"vlm\.path: .*not found"):
        convert(folder, tmp_path / "qwen2", to="qwen2-vl")
    written = convert(folder, tmp_path / "qwen2", to="qwen2-vl", vlm_path=str(home / "qwen"), verify=True)
    vlm, original = load_vlm(written)[0].state_dict(), load_vlm(home / "qwen")[0].state_dict()
    assert all(torch.equal(vlm[name], tensor) for name, tensor in original.items())


def test_a_run_resumes_from_an_export_whose_vlm_is_a_folder(home, tmp_path):
    """The names of the folders count; whether it is the same VLM is told by its fingerprint."""
    folder = convert(home / "checkpoint", tmp_path / "out", to="deepspeed-universal")

    def start(vlm):
        arguments = ["--output_dir", str(tmp_path / "run"), "--resume", str(folder), "--vlm.path", vlm]
        return find_origin(parse_config([*arguments, "--codec.path", "/elsewhere/autoencoder"]))

    assert start("/elsewhere/qwen").components == folder
    with pytest.raises(
        UserError, match=r"belongs to another network \(vlm\.path: the run has 'qwen', this command 'lama'"
    ):
        start("/elsewhere/lama")


def test_hub_ids_and_relative_paths_stay(home, tmp_path):
    source = shutil.copytree(home / "checkpoint", tmp_path / "source")
    file = source / "pipeline.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"vlm_path": "Qwen/Qwen2-VL-2B-Instruct"}))
    save_config(
        parse_config(["--output_dir", "runs/x", "--vlm.path", "Qwen/Qwen2-VL-2B-Instruct"]), source / "config.yaml"
    )
    (source / "config.json").write_text((source / "config.json").read_text().replace(str(home), "Qwen/Qwen2-VL-2B"))
    folder = convert(source, tmp_path / "out", to="safetensors")
    assert json.loads((folder / "pipeline.json").read_text())["vlm_path"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == "Qwen/Qwen2-VL-2B"
    assert (folder / "config.yaml").read_bytes() == (source / "config.yaml").read_bytes()


def test_a_saved_pipeline_holds_no_absolute_path(home, tmp_path):
    pipeline = load_pipeline(home / "checkpoint")
    pipeline.save_pretrained(home / "saved")
    LatteFlowPipeline.from_pretrained(home / "saved").save_pretrained(tmp_path / "again")
    assert pipeline.config.vlm_path == str(home / "qwen")
    for file in [
        path for folder in (home / "saved", tmp_path / "again") for path in folder.rglob("*") if path.is_file()
    ]:
        assert HOME.encode() not in file.read_bytes(), file
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vlm_path"] == "../qwen"
    with pytest.raises(ValueError, match=rf"cannot load {tmp_path}/qwen: not found; .*\(vlm_path, or vlm\)"):
        LatteFlowPipeline.from_pretrained(tmp_path / "again")
    loaded = LatteFlowPipeline.from_pretrained(tmp_path / "again", vlm_path=str(home / "qwen"))
    options = {"num_steps": 4, "cfg_scale": 2.0}
    assert (loaded.generate([""], **options) == pipeline.generate([""], **options)).all()


class TestCopies:
    """Known regular files alone."""

    @pytest.fixture
    def source(self, home, tmp_path):
        source = shutil.copytree(home / "checkpoint", tmp_path / "source")
        shutil.copytree(home / "qwen", source / "vlm")
        return source

    def test_other_files_links_and_pipes_are_left_out_and_named_once(self, source, tmp_path, capsys):
        secret = tmp_path / "secret.txt"
        secret.write_text("password")
        (source / "tokenizer" / "notes.txt").write_text("mine")
        (source / "tokenizer" / "merges.txt").symlink_to(secret)
        (source / "tokenizer" / "code.py").write_text("1")
        (source / "vlm" / "deep").mkdir()
        (source / "vlm" / "deep" / "config.json").write_text("{}")
        os.mkfifo(source / "vlm" / "pytorch_model.bin")
        (source / "vlm" / "folder").symlink_to(tmp_path)
        folder = convert(source, tmp_path / "out", to="safetensors")
        left = (
            "tokenizer/code.py, tokenizer/merges.txt, tokenizer/notes.txt, vlm/deep/config.json, vlm/folder and 1 more"
        )
        assert capsys.readouterr().out.count(f"not copied: {left}") == 1
        copied = {path.name for part in ("tokenizer", "vlm") for path in (folder / part).rglob("*")}
        assert copied == {
            "chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "config.json",
            "generation_config.json", "model.safetensors",
        }  # fmt: skip
        (source / "tokenizer" / "merges.txt").unlink()  # a loader refuses it
        for to in ("qwen2-vl", "megatron-gpt"):
            again = convert(source, tmp_path / to, to=to)
            assert not {"notes.txt", "code.py"} & {path.name for path in again.rglob("*")}

    def test_a_linked_folder_is_refused(self, source, tmp_path):
        (source / "tokenizer").rename(tmp_path / "tokenizer")
        (source / "tokenizer").symlink_to(tmp_path / "tokenizer")
        with pytest.raises(
            UserError, match=r"tokenizer: none of its files is copied; accepted: tokenizer\.json, .*no links"
        ):
            convert(source, tmp_path / "out", to="safetensors")
        assert not (tmp_path / "out").exists()

    def test_the_links_of_a_hub_cache_are_copied_as_files(self, source, tmp_path, capsys):
        repository = tmp_path / "models--someone--export"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "blobs").mkdir()
        snapshot = source.rename(repository / "snapshots" / COMMIT)
        for number, file in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
            blob = file.rename(repository / "blobs" / str(number))
            file.symlink_to(os.path.relpath(blob, file.parent))
        folder = convert(snapshot, tmp_path / "out", to="pt")
        assert "not copied" not in capsys.readouterr().out
        assert (folder / "tokenizer" / "tokenizer.json").is_file()
        assert not any(path.is_symlink() for path in folder.rglob("*"))

    def test_a_configuration_that_is_none_is_left_out(self, source, tmp_path, capsys):
        (source / "config.yaml").write_text("colour: red\n")
        folder = convert(source, tmp_path / "out", to="pt")
        assert "not copied: config.yaml (" in capsys.readouterr().out
        assert not (folder / "config.yaml").exists()

    def test_the_configuration_still_loads(self, source, tmp_path):
        config = load_config(convert(source, tmp_path / "out", to="pt") / "config.yaml")
        assert (config.output_dir, config.data.path, config.codec.path) == ("run", "pictures", "autoencoder")


class TestNumbers:
    @pytest.fixture
    def folder(self, home, tmp_path):
        return shutil.copytree(home / "checkpoint", tmp_path / "source")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", ["fp32", "exp_avg_sq"])
    def test_weights_and_states_that_are_not_finite_are_refused(self, folder, tmp_path, value, kind):
        file = folder / "zero" / NAME / f"{kind}.pt"
        content = torch.load(file)
        content["param"].view(-1)[3] = value
        torch.save(content, file)
        which = "model" if kind == "fp32" else kind
        with pytest.raises(
            UserError, match=rf"{NAME} \({which}\): holds NaN or infinite values.*; accepted: finite values"
        ):
            convert(folder, tmp_path / "out", to="deepspeed-universal")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_weights_that_a_type_cannot_hold_are_refused(self, folder, tmp_path):
        file = folder / "zero" / NAME / "ema.pt"
        content = torch.load(file)
        content["param"].view(-1)[3] = 1e5
        torch.save(content, file)
        with pytest.raises(
            UserError, match=rf"{NAME} \(ema\): .*infinite values as float16.* a type with a larger range"
        ):
            convert(folder, tmp_path / "out", to="pt", dtype="float16")
        convert(folder, tmp_path / "out", to="pt", dtype="bfloat16")

    def test_a_frozen_vlm_that_is_not_finite_is_refused(self, home, folder, tmp_path):
        settings = json.loads((folder / "pipeline.json").read_text())
        (folder / "pipeline.json").write_text(json.dumps(settings | {"vlm_path": None, "vlm_fingerprint": None}))
        vlm, _ = load_vlm(home / "qwen")
        vlm.model.language_model.norm.weight.data[0] = math.nan
        vlm.save_pretrained(folder / "vlm")
        with pytest.raises(UserError, match=r"model\.language_model\.norm\.weight: holds NaN"):
            convert(folder, tmp_path / "out", to="qwen2-vl")

    @pytest.mark.parametrize(("step", "shown"), [(-5, "-5"), (2**200, "an integer of 201 bits")])
    @pytest.mark.parametrize("file", ["universal", "safetensors", "pt", "export.json"])
    def test_steps_that_no_run_has_are_refused(self, home, folder, tmp_path, file, step, shown):
        source = open_weights(folder)
        weights = {name: source.read(name) for name in source.tensors}
        if file == "universal":
            states = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
            torch.save(states | {"step": step}, folder / "mp_rank_00_model_states.pt")
        else:
            shutil.rmtree(folder / "zero")
            (folder / "mp_rank_00_model_states.pt").unlink()
        if file == "safetensors":
            write_safetensors(folder, InMemory(weights), max_shard_size=None, metadata={"step": str(step)})
        elif file == "pt":
            torch.save({"model": weights, "step": step}, folder / "pytorch_model.bin")
        elif file == "export.json":
            write_torch_file(folder, InMemory(weights))
            record = {"format": "pt", "weights": "ema", "step": step, "files": {}}
            (folder / "export.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match=rf"source.*: its step is {shown}; accepted: 0 to 9223372036854775807"):
            convert(folder, tmp_path / "out", to="pt")

    @pytest.mark.parametrize("updates", [-5.0, 2.0**200, math.nan, math.inf])
    def test_numbers_of_updates_that_no_run_has_are_refused(self, folder, tmp_path, updates):
        for file in folder.glob("zero/*/step.pt"):
            torch.save(torch.tensor(updates, dtype=torch.float64), file)
        with pytest.raises(UserError, match=r"source"):
            convert(folder, tmp_path / "out", to="pt")
