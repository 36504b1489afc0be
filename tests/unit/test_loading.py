"""What a folder that somebody else wrote can make the loaders do: nothing beyond reading its own files."""

import copy
import json
import shutil
import socket

import pytest
import torch

from latte_flow.model.backbone import fingerprint, load_image_processor, load_tokenizer, load_vlm
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import tokenize_prompts
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.tiny_vlm import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.model_folder import PipelineConfig, save_components
from latte_flow.training.checkpoint.opening import load_pipeline
from latte_flow.training.errors import UserError
from tests.tiny_models import save_tiny_dc_ae

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "latte/tiny-vlm"
CODEC = {"kind": "pixel", "image_channels": 3, "patch": 1}


class Request(BaseException):
    """Neither caught nor tried again by huggingface_hub."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A request raises. The environment of the tests is offline: not in these."""

    def refuse(host, *_, **__):
        raise Request(host)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VLM in shards with its tokenizer, and an autoencoder: name -> folder."""
    base = tmp_path_factory.mktemp("models")
    tokenizer = build_tiny_tokenizer(["a red square"])
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15)
    vlm = build_tiny_vlm(config, seed=0)
    vlm.save_pretrained(base / "vlm", max_shard_size="100KB")
    tokenizer.save_pretrained(base / "vlm")
    build_tiny_image_processor(config).save_pretrained(base / "vlm")
    network = LatteFlowConfig(vlm_config=vlm.config, latent_channels=3, latent_size=(4, 4), num_groups=2)
    LatteFlowModel.from_vlm(vlm, network).save_pretrained(base / "network", max_shard_size="100KB")
    save_tiny_dc_ae(base / "autoencoder")
    return {name: base / name for name in ("vlm", "network", "autoencoder")}


LOADERS = {
    "vlm": load_vlm,
    "network": LatteFlowModel.from_pretrained,
    "autoencoder": lambda folder: load_codec("dc-ae", path=folder),
}


def make_index(folder) -> dict:
    """Return the content of a folder's index; of a single file, one is made."""
    found = next(folder.glob("*.index.json"), None)
    if found is None:
        weights = next(folder.glob("*.safetensors"))
        found = folder / f"{weights.name}.index.json"
        shard = weights.rename(folder / f"{weights.stem}-00001-of-00001.safetensors")
        names = open_weights(shard).tensors
        found.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard.name)}))
    return found


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("leads", ["up", "absolute", "link"])
def test_a_shard_outside_the_folder_is_refused(folders, tmp_path, kind, leads):
    folder = shutil.copytree(folders[kind], tmp_path / "models" / kind)
    index = make_index(folder)
    LOADERS[kind](folder)
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    outside = (folder / shard).rename(tmp_path / shard)
    if leads == "link":
        (folder / shard).symlink_to(outside)
    else:
        other = str(outside) if leads == "absolute" else f"../../{shard}"
        content["weight_map"] = {n: other if f == shard else f for n, f in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    refused = (
        rf"{shard}: no regular file of its folder; accepted" if leads == "link" else "accepted: a file in the folder"
    )
    with pytest.raises(ValueError, match=refused):
        LOADERS[kind](folder)
    if kind == "network":
        with pytest.raises(ValueError, match=refused):
            open_weights(folder)


def test_links_of_a_hub_cache_are_followed(folders, tmp_path):
    repository = tmp_path / "models--latte--tiny-vlm"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copytree(folders["vlm"], repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load_vlm(snapshot)
    outside = (repository / "blobs" / "config.json").rename(tmp_path / "config.json")
    (repository / "blobs" / "config.json").symlink_to(outside)
    with pytest.raises(ValueError, match=r"config.json: no regular file of its folder"):
        load_vlm(snapshot)


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kind", ["vlm", "network"])
def test_code_of_the_hub_is_not_fetched(folders, tmp_path, kind, field):
    """transformers downloads and runs an attention kernel that a config.json names."""
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {field: "someone/kernel"}))
    with pytest.raises(ValueError, match=r"_attn_implementation: 'someone/kernel' is code from the hub; accepted"):
        LOADERS[kind](folder)


def test_code_named_by_the_vlm_config_of_a_network_is_not_asked_about(folders, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = LatteFlowConfig.from_pretrained(folders["network"])
    config.variant = "blend"
    config.vlm_config = type("Other", (type(config.vlm_config),), {})(**config.vlm_config.to_dict())
    config.vlm_config.auto_map = {"AutoModelForImageTextToText": "someone/code--model.Model"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        LatteFlowModel(config)


class TestMistypedPaths:
    """A missing folder is not looked up on the hub."""

    PATHS = ("./models/qwen", "/data/qwen", "models/x/y/z", "~/qwen", "there/qwen", "a b", "name.git", "file")

    @pytest.fixture(autouse=True)
    def somewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "there").mkdir()
        (tmp_path / "file").touch()

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("load", [*LOADERS.values(), load_tokenizer, load_image_processor])
    def test_they_are_refused_without_a_request(self, path, load):
        message = (
            rf"path: cannot load {path}: not found; accepted: a folder .*, or a hub id \(NAME or ORGANISATION/NAME\)"
        )
        with pytest.raises(ValueError, match=message):
            load(path)

    @pytest.mark.parametrize("load", LOADERS.values())
    def test_a_hub_id_that_was_given_is_asked_for(self, load):
        with pytest.raises(Request):
            load("someone/model")


@pytest.fixture(scope="module")
def pipeline(folders):
    vlm, tokenizer = load_vlm(folders["vlm"])
    model = LatteFlowModel.from_pretrained(folders["network"])
    return LatteFlowPipeline(model=model, tokenizer=tokenizer, codec=load_codec(**CODEC), vlm=vlm)


def save_converted(pipeline, folder, **changes):
    """Write a pipeline as a conversion does, with changes to pipeline.json."""
    settings = PipelineConfig(resolution=4, image_channels=3, prompt_template="{}", null_prompt="", codec=CODEC)
    parts = {"tokenizer": pipeline.tokenizer, "image_processor": None, "vlm": pipeline.vlm}
    save_components(folder, pipeline.model.config, settings, **parts)
    pipeline.model.save_pretrained(folder)
    file = folder / "pipeline.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save_diffusers(pipeline, folder, **changes):
    pipeline.save_pretrained(folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


LAYOUTS = {"pipeline.json": save_converted, "model_index.json": save_diffusers}


@pytest.mark.parametrize("file", LAYOUTS)
class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompt_template": "{0.__class__}"}, r"prompt_template: got .*; accepted: a text with \{\} exactly once"),
            ({"prompt_template": "{:>1000000000}"}, "prompt_template: .*exactly once"),
            ({"prompt_template": "{!r}"}, "prompt_template: .*exactly once"),
            ({"prompt_template": "no place"}, "prompt_template: .*exactly once"),
            ({"prompt_template": "{}" + "x" * 2**20}, "prompt_template: .*at most 1048576"),
            ({"prompt_template": None}, "prompt_template: got None"),
            ({"null_prompt": 5}, "null_prompt: got 5"),
            ({"null_prompt": "x" * (2**20 + 1)}, "null_prompt: .*at most 1048576"),
            ({"max_prompt_tokens": 0}, "max_prompt_tokens: got 0; accepted: .*greater than 0"),
            ({"max_prompt_tokens": "9"}, "max_prompt_tokens: got '9'"),
            ({"class_names": "cat"}, "class_names: got 'cat'"),
            ({"class_names": ["cat", 5]}, r"class_names\.1: got 5"),
            ({"vlm_path": ""}, "vlm_path: got ''"),
            ({"vlm_path": 5}, "vlm_path: got 5"),
            ({"vlm_fingerprint": "../x"}, "vlm_fingerprint: got '../x'"),
            ({"colour": "red"}, "colour: got 'red'"),
        ],
    )
    def test_what_no_pipeline_has_is_refused_by_name(self, pipeline, tmp_path, file, changes, message):
        LAYOUTS[file](pipeline, tmp_path, **changes)
        with pytest.raises(UserError, match=rf"{file}: damaged \({message}"):
            load_pipeline(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "{", "[" * 5000, '{"prompt_template": NaN}'])
    def test_what_is_no_object_is_refused(self, pipeline, tmp_path, file, content):
        LAYOUTS[file](pipeline, tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(UserError, match=rf"{file}: damaged"):
            load_pipeline(tmp_path)

    def test_older_ones_without_the_optional_ones_load(self, pipeline, tmp_path, file):
        LAYOUTS[file](pipeline, tmp_path)
        content = json.loads((tmp_path / file).read_text())
        for name in ("max_prompt_tokens", "class_names", "vlm_path", "vlm_fingerprint"):
            del content[name]
        (tmp_path / file).write_text(json.dumps(content))
        assert load_pipeline(tmp_path).messages(["a red square"]) == ["a red square"]

    def test_a_hub_id_that_a_file_names_is_taken_from_the_cache_alone(
        self, pipeline, folders, tmp_path, file, monkeypatch
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        reference = {"vlm_path": HUB_ID, "vlm_fingerprint": fingerprint(folders["vlm"])}
        saved = tmp_path / "saved"
        LAYOUTS[file](pipeline, saved, **reference, **({} if file == "pipeline.json" else {"vlm": [None, None]}))
        with pytest.raises(UserError, match=rf"it is not in this machine's hub cache, .*`hf download {HUB_ID}`"):
            load_pipeline(saved)
        with pytest.raises(Request):  # given by the caller
            load_pipeline(saved, vlm_path=HUB_ID)
        repository = tmp_path / "cache" / "models--latte--tiny-vlm"
        shutil.copytree(folders["vlm"], repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        loaded = load_pipeline(saved)
        assert loaded.config.vlm_path == HUB_ID
        assert torch.equal(loaded.vlm.get_input_embeddings().weight, pipeline.vlm.get_input_embeddings().weight)


def test_the_codec_of_a_preset_is_taken_from_the_cache_alone(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_converted(pipeline, tmp_path / "saved", codec={"kind": "dc-ae", "preset": "dc-ae-f32c32-in-1.0"})
    with pytest.raises(UserError, match=r"codec\.path: .* it is not in this machine's hub cache.*\(codec_path\)"):
        load_pipeline(tmp_path / "saved")
    with pytest.raises(Request):
        load_pipeline(tmp_path / "saved", codec_path="someone/autoencoder")


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"kind": "pixel", "meta": True}, r"codec\.meta: got True"),
        ({"kind": "pixel", "patch": 0}, r"codec\.patch: got 0"),
        ({"kind": "pixel", "image_channels": 10**9}, r"codec\.image_channels: got 1000000000"),
        ({"kind": "dc-ae", "scaling_factor": 0}, r"codec\.scaling_factor: got 0"),
        ({}, r"codec\.kind: "),
        ("pixel", "codec: got 'pixel'"),
    ],
)
def test_a_codec_that_no_run_has_is_refused_by_name(pipeline, tmp_path, codec, message):
    save_converted(pipeline, tmp_path, codec=codec)
    with pytest.raises(UserError, match=rf"pipeline.json: damaged \({message}"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("field", ["resolution", "image_channels"])
@pytest.mark.parametrize("value", [0, -4, 1.5, True, "4", 10**9, None])
def test_a_size_that_no_run_has_is_refused_by_name(pipeline, tmp_path, field, value):
    save_converted(pipeline, tmp_path, **{field: value})
    with pytest.raises(UserError, match=rf"pipeline.json: damaged \({field}: got {value!r}"):
        load_pipeline(tmp_path)


class TestModelIndex:
    """diffusers imports what model_index.json names."""

    @pytest.fixture
    def executed(self, tmp_path, monkeypatch):
        (tmp_path / "evil").mkdir()
        code = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nclass LatteFlowPipeline: pass\n"
        (tmp_path / "evil" / "evil_module.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "evil"))
        return lambda: list(tmp_path.rglob("executed"))

    @pytest.mark.parametrize("name", ["model", "codec", "tokenizer", "vlm", "image_processor"])
    @pytest.mark.parametrize(
        "entry",
        [
            ["evil_module", "LatteFlowPipeline"],
            ["os", "system"],
            ["transformers", "AutoTokenizer"],
            ["x"],
            [None, "x"],
            [5, []],
            5,
        ],
    )
    def test_a_class_that_is_no_such_component_is_refused(self, pipeline, tmp_path, executed, name, entry):
        save_diffusers(pipeline, tmp_path / "saved", **{name: entry})
        with pytest.raises(
            ValueError, match=rf"model_index.json: damaged \({name}: got .*; accepted: the module and name of a"
        ):
            LatteFlowPipeline.from_pretrained(tmp_path / "saved")
        assert not executed()

    @pytest.mark.parametrize("entry", ["evil_module", ["evil_module", "LatteFlowPipeline"], "DiffusionPipeline", None])
    def test_another_pipeline_is_refused(self, pipeline, tmp_path, executed, entry):
        save_diffusers(pipeline, tmp_path / "saved", _class_name=entry)
        shutil.copy(tmp_path / "evil" / "evil_module.py", tmp_path / "saved")
        with pytest.raises(ValueError, match=r"model_index.json: damaged \(_class_name: .*accepted: LatteFlowPipeline"):
            LatteFlowPipeline.from_pretrained(tmp_path / "saved")
        assert not executed()

    @pytest.mark.parametrize("place", ["None.py", "model/latte_flow.model.latte_flow.py", "tokenizer/transformers.py"])
    def test_code_in_the_place_of_a_component_is_not_executed(self, pipeline, tmp_path, executed, place):
        """diffusers takes these for a custom pipeline and for custom components."""
        save_diffusers(pipeline, tmp_path / "saved")
        shutil.copy(tmp_path / "evil" / "evil_module.py", tmp_path / "saved" / place)
        with pytest.raises(ValueError, match=rf"{place}: code is not loaded; accepted"):
            LatteFlowPipeline.from_pretrained(tmp_path / "saved")
        assert not executed()

    def test_shards_of_components_stay_in_their_folder(self, pipeline, tmp_path):
        save_diffusers(pipeline, tmp_path / "saved")
        for name in ("model", "vlm"):
            folder = shutil.copytree(tmp_path / "saved", tmp_path / name)
            index = make_index(folder / name)
            content = json.loads(index.read_text())
            index.write_text(json.dumps(content | {"weight_map": dict.fromkeys(content["weight_map"], "../../x")}))
            with pytest.raises(ValueError, match="accepted: a file in the folder of the index"):
                LatteFlowPipeline.from_pretrained(folder)


class TestLengths:
    def test_a_rendered_message_is_limited(self, pipeline):
        wide = LatteFlowPipeline(**pipeline.components, prompt_template="{}" + "x" * 2**19, class_names=["y" * 2**20])
        assert len(wide.messages(["a"])[0]) == 2**19 + 1
        for prompt in (0, "z" * 2**20):
            with pytest.raises(ValueError, match=r"prompt: got 1572864 characters; accepted: up to 1048576"):
                wide.messages([prompt])

    def test_the_output_of_a_chat_template_is_limited(self, pipeline):
        tokenizer = copy.deepcopy(pipeline.tokenizer)
        tokenizer.chat_template = "{% for i in range(99999) %}{{ messages[0]['content'] }}{% endfor %}"
        with pytest.raises(ValueError, match=r"prompts: \d+ tokens in the tokenizer's chat format; accepted: 1 to"):
            tokenize_prompts(tokenizer, ["x" * 20])

    def test_a_long_range_of_a_chat_template_is_refused_by_its_sandbox(self, pipeline):
        tokenizer = copy.deepcopy(pipeline.tokenizer)
        tokenizer.chat_template = "{% for i in range(10**9) %}{% endfor %}"
        with pytest.raises(ValueError, match=r"chat template: .*Range too big"):
            tokenize_prompts(tokenizer, ["x"])
