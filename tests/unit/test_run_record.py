"""A run is on record with all that shapes its prompts and latents; a resume with anything else is refused and names it."""

import dataclasses
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.training.components import build_components
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.configs.saved import save_config
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.record import DataRecord
from latte_flow.training.errors import UserError
from latte_flow.training.run_folder import (
    Origin,
    check_files,
    components_folder,
    origin_differences,
    record_start,
    write_components,
)
from tests.tiny_models import save_tiny_dc_ae

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEMPLATE = "vlm/chat_template.jinja"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures of two classes, a file of their names, a VLM and an autoencoder."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("n1", "n2"):
        (root / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / "images" / name / "0.png")
    (root / "names.txt").write_text("crane\ncat\n")
    tokenizer = build_tiny_tokenizer(["Generate an image of a crane."])
    build_tiny_vlm(tiny_vlm_config(tokenizer, **SIZES, initializer_range=0.02), seed=0).save_pretrained(root / "vlm")
    tokenizer.save_pretrained(root / "vlm")
    save_tiny_dc_ae(root / "codec")
    return root


class Run:
    """A run's folders, and a start of it as training/trainer.py does it, without training."""

    def __init__(self, root: Path, *arguments: str):
        self.root, self.output_dir = root, root / "run"
        self.arguments = ["--data.dataset", "imagefolder", "--data.path", str(root / "images")]
        self.arguments += ["--data.resolution", "16", "--data.class_names", str(root / "names.txt"), *arguments]

    def start(self, *more: str, step: int = 0) -> DataRecord:
        config = parse_config(["--output_dir", str(self.output_dir), *self.arguments, *more])
        images = load_image_dataset(config.data)
        record = DataRecord(images, self.output_dir / "data.json", allow_changed=config.data.allow_changed)
        check_files(config, record, own=True)
        components = build_components(config, images, components_folder(config, None))
        check_files(config, record, own=False)
        write_components(config, components, None)
        record_start(config, record, step)
        return record

    @property
    def recorded(self) -> dict:
        return json.loads((self.output_dir / "data.json").read_text())


def copied(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources, tmp_path / "all"))


@pytest.fixture
def run(sources, tmp_path):
    """A run with a VLM and an autoencoder of its own, started."""
    root = copied(sources, tmp_path)
    codec = ["--codec.kind", "dc-ae", "--codec.path", str(root / "codec")]
    started = Run(root, "--vlm.path", str(root / "vlm"), *codec)
    started.start()
    return started


@pytest.fixture
def tiny_run(sources, tmp_path):
    """A run with the tiny VLM, which its own folder holds."""
    sizes = [text for name, value in SIZES.items() for text in (f"--vlm.tiny.{name}", str(value))]
    started = Run(copied(sources, tmp_path), "--codec.kind", "pixel", *sizes)
    started.start()
    return started


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def swap_tokens(file: Path) -> None:
    """Give two letters of a vocabulary each other's number."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def other_decoder(root: Path) -> None:
    """Another decoder beside the same encoder: the latents stay, the sample grids do not."""
    save_tiny_dc_ae(root / "other", seed=1)
    weights, other = (load_file(root / folder / WEIGHTS) for folder in ("codec", "other"))
    decoder = {name: tensor for name, tensor in other.items() if name.startswith("decoder.")}
    save_file(weights | decoder, root / "codec" / WEIGHTS, metadata={"format": "pt"})


def test_what_is_on_record(run):
    assert {name.split("/")[0] for name in run.recorded["files"]} == {"model", "vlm.path", "codec.path"}
    assert {
        "model/config.json",
        "model/pipeline.json",
        "model/tokenizer/tokenizer.json",
        "vlm.path/chat_template.jinja",
        "vlm.path/tokenizer.json",
        "codec.path/config.json",
        f"codec.path/{WEIGHTS}",
    } <= run.recorded["files"].keys()


def test_the_same_command_resumes_and_leaves_the_record_as_it_is(run):
    before = (run.output_dir / "data.json").read_bytes()
    run.start(step=7)
    assert (run.output_dir / "data.json").read_bytes() == before


CHANGES = {
    "chat template": (
        lambda r: replace(r / TEMPLATE, "assistant", "helper"),
        "vlm.path/chat_template.jinja has changed",
    ),
    "no chat template": (lambda r: (r / TEMPLATE).rename(r / "old"), "vlm.path/chat_template.jinja is missing"),
    "vocabulary": (lambda r: swap_tokens(r / "vlm/tokenizer.json"), "vlm.path/tokenizer.json has changed"),
    "another vocabulary": (lambda r: (r / "vlm/vocab.json").write_text("{}"), "vlm.path/vocab.json is new"),
    "autoencoder": (lambda r: save_tiny_dc_ae(r / "codec", seed=1), f"codec.path/{WEIGHTS} has changed"),
    "decoder": (other_decoder, f"codec.path/{WEIGHTS} has changed"),
    "activation": (lambda r: replace(r / "codec/config.json", "silu", "relu"), "codec.path/config.json has changed"),
    "network": (lambda r: replace(r / "run/model/config.json", "couple", "blend"), "model/config.json has changed"),
    "name": (lambda r: replace(r / "run/model/pipeline.json", "crane", "x"), "model/pipeline.json has changed"),
    "damaged": (lambda r: (r / "run/model/pipeline.json").write_text("{"), "model/pipeline.json has changed"),
    "tokenizer": (
        lambda r: swap_tokens(r / "run/model/tokenizer/tokenizer.json"),
        "model/tokenizer/tokenizer.json has changed",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_named_and_the_run_is_refused(run, what):
    change, named = CHANGES[what]
    before = run.recorded
    change(run.root)
    with pytest.raises(UserError, match=rf"{named}.* since this run was started .*; accepted: the files as they were"):
        run.start("--data.allow_changed", "true")  # which is about the data
    assert run.recorded == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_tiny_vlm_of_a_run_is_on_record(tiny_run, name):
    tiny_run.start()
    flip(tiny_run.output_dir / "model" / "vlm" / name)
    with pytest.raises(UserError, match=rf"^model/vlm/{name} has changed since this run was started"):
        tiny_run.start()


def test_a_file_of_class_names_that_was_edited_is_refused_unless_changed_data_are_allowed(run, capsys):
    before = run.recorded
    (run.root / "names.txt").write_text("crane\ndog\n")
    with pytest.raises(
        UserError, match=r"^data\.class_names: the prompts of .*images have changed since this run .* --data"
    ):
        run.start()
    assert run.recorded == before
    run.start("--data.allow_changed", "true", step=5)
    assert "the prompts of" in capsys.readouterr().out
    run.start()  # the flag is not needed any more
    assert run.recorded["before"] == [before | {"until_step": 5}]
    assert run.recorded["prompts"] != before["prompts"]


def test_a_file_of_class_names_may_change_where_it_names_the_same(run):
    before = run.recorded
    (run.root / "names.txt").write_text("n2 cat, feline\nn1 crane\n")
    run.start()
    assert run.recorded == before


def test_names_that_are_resolved_otherwise_are_refused(sources, tmp_path):
    """As when another version of this package, or of one it reads names from, was installed meanwhile."""
    fields = ["--data.dataset", "imagefolder", "--data.path", str(sources / "images"), "--data.resolution", "16"]
    images = load_image_dataset(parse_config(fields).data)
    file = tmp_path / "data.json"
    DataRecord(images, file, allow_changed=False).update(0)
    for changed in ({"prompts": images.prompts[::-1]}, {"prompt_rows": [0, 0]}):
        with pytest.raises(UserError, match=r"^data\.class_names: the prompts of"):
            DataRecord(dataclasses.replace(images, **changed), file, allow_changed=False)
    with pytest.raises(UserError, match=r"^data\.path: the prompts of"):
        DataRecord(dataclasses.replace(images, class_names=None, prompts=["a", "b"]), file, allow_changed=False)


def test_an_older_record_accepts_what_it_does_not_know_and_is_completed(run):
    whole = run.recorded
    old = {name: whole[name] for name in ("name", "length", "fingerprint")}
    (run.output_dir / "data.json").write_text(json.dumps(old))
    replace(run.root / TEMPLATE, "assistant", "helper")
    run.start()
    assert {name for name in whole if run.recorded[name] != whole[name]} == {"files"}
    replace(run.root / TEMPLATE, "helper", "assistant")
    with pytest.raises(UserError, match=r"chat_template\.jinja has changed"):
        run.start()


def test_differences_from_the_run_that_a_new_one_starts_from_are_lines_and_no_errors(run, tmp_path):
    config = parse_config(["--output_dir", str(tmp_path / "new"), *run.arguments])
    save_config(parse_config(["--output_dir", str(run.output_dir), *run.arguments]), run.output_dir / "config.yaml")
    origin = Origin(run.output_dir / "config.yaml", run.output_dir / "model", [])

    def lines():
        record = DataRecord(load_image_dataset(config.data), tmp_path / "new" / "data.json", allow_changed=False)
        return origin_differences(config, origin, record)

    assert lines() == []
    (run.root / "names.txt").write_text("crane\ndog\n")
    save_tiny_dc_ae(run.root / "codec", seed=1)
    (run.output_dir / "model" / "config.json").write_text("{}")  # not read: the new run writes its own
    prompts, codec = lines()
    assert prompts.startswith("data.class_names: the prompts of")
    assert "since that run was started" in prompts
    assert codec == f"codec.path/{WEIGHTS} has changed since that run was started"
    (run.output_dir / "data.json").unlink()
    assert lines() == []


@pytest.mark.parametrize("content", ['{"fingerprint": "x", "files": []}', '{"fingerprint": "x", "prompts": 3}'])
def test_a_damaged_record_is_named(run, content):
    (run.output_dir / "data.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.json: damaged .*(files|prompts): wrong type"):
        run.start()
