"""Odd files, sizes, tensors, variables and devices: one line that names them, and never a traceback."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from latte_flow.model.backbone import load_tokenizer, read_vlm_config
from latte_flow.model.configuration import load_network_config
from latte_flow.model.context import check_chat_template, tokenize_prompts, truncate_prompts
from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import copy_settings, read_index
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.tiny_vlm import build_tiny_tokenizer
from latte_flow.tools import command_line
from latte_flow.tools.digit_accuracy import read_samples
from latte_flow.training import errors, run_lock
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import read_export_record
from latte_flow.training.checkpoint.io import TolerantCheckpointEngine
from latte_flow.training.checkpoint.manifest import read_manifest
from latte_flow.training.checkpoint.model_folder import PipelineConfig
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.data.record import _read as read_record
from latte_flow.training.distributed.ranks import start_alone_without_launcher
from latte_flow.training.errors import UserError, exit_code
from latte_flow.training.monitor.metrics import MetricsWriter
from latte_flow.training.run_folder import check_output_dir
from latte_flow.training.run_lock import LOCK_FILE, RunLock
from tests.tiny import make_config, make_vlm

# --- JSON files -------------------------------------------------------------------------------------------------------------

CONTENTS = {"nested": b"[" * 100_000, "list": b"[1]", "number": b"7", "no text": b"\xff\xfe{}", "half": b'{"a": '}
READERS = {
    "config.json": load_network_config,
    "pipeline.json": PipelineConfig.load,
    "model_index.json": LatteFlowPipeline.from_pretrained,
    "manifest.json": read_manifest,
    "export.json": read_export_record,
    "data.json": lambda folder: read_record(folder / "data.json"),
    "model.safetensors.index.json": lambda folder: read_index(folder / "model.safetensors.index.json"),
    "generation_config.json": lambda folder: copy_settings(folder / "generation_config.json", folder / "copy"),
    "samples.jsonl": read_samples,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", READERS)
def test_an_odd_json_file_is_named(tmp_path, file, content):
    if file == "generation_config.json" and content in ("list", "number"):
        pytest.skip("copied as it is: transformers reads it")
    (tmp_path / file).write_bytes(CONTENTS[content])
    with pytest.raises(ValueError, match=rf"{tmp_path / file}(:1)?: .*\(") as error:
        READERS[file](tmp_path)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "manifest.json", "data.json", "model.safetensors.index.json"])
def test_a_folder_or_a_dangling_link_in_place_of_a_json_file_is_named(tmp_path, file):
    path = tmp_path / file
    path.mkdir()
    with pytest.raises(ValueError, match=rf"{path}: cannot be read: Is a directory"):
        READERS[file](tmp_path)
    path.rmdir()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"{path}: not found"):
        READERS[file](tmp_path)


@pytest.fixture(scope="module")
def vlm():
    return make_vlm(4)


@pytest.fixture(scope="module")
def saved(vlm, tmp_path_factory):
    """The folder of a VLM and its tokenizer."""
    folder = tmp_path_factory.mktemp("vlm")
    vlm.config.save_pretrained(folder)
    build_tiny_tokenizer(["a cat"], 512).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "read"),
    [("config.json", read_vlm_config), ("tokenizer_config.json", load_tokenizer), ("tokenizer.json", load_tokenizer)],
)
@pytest.mark.parametrize("content", ["nested", "list", "no text", "half"])
def test_what_transformers_cannot_read_is_named(saved, tmp_path, file, read, content):
    folder = shutil.copytree(saved, tmp_path / "vlm")
    read(folder)
    (folder / file).write_bytes(CONTENTS[content])
    with pytest.raises(ValueError, match=rf"^path: cannot load {folder}: "):
        read(folder)


# --- sizes ------------------------------------------------------------------------------------------------------------------

SIZES = [
    ("text_config.hidden_size", 10**12),
    ("text_config.hidden_size", -64),
    ("text_config.hidden_size", 2**200),
    ("text_config.num_hidden_layers", 10**9),
    ("text_config.vocab_size", 10**12),
    ("vision_config.depth", 10**9),
    ("vision_config.embed_dim", -1),
]


def change(file, name, value):
    settings = json.loads(file.read_text())
    *sections, last = name.split(".")
    section = settings
    for part in sections:
        section = section[part]
    section[last] = value
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(("name", "value"), SIZES)
def test_an_absurd_size_is_refused_before_anything_is_built(saved, tmp_path, name, value):
    shutil.copy(saved / "config.json", tmp_path)
    change(tmp_path / "config.json", name, value)
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*{name}: got .*; accepted: 0 to 1048576"):
        read_vlm_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"vlm_config.{name}", value) for name, value in SIZES),
        ("latent_channels", 10**12),
        ("latent_size", [10**9, 8]),
        ("patch_size", -1),
        ("num_groups", 10**9),
    ],
)
def test_an_absurd_size_of_a_network_is_refused(vlm, tmp_path, name, value):
    make_config(vlm).save_pretrained(tmp_path)
    load_network_config(tmp_path)
    change(tmp_path / "config.json", name, value)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: damaged \({name}: got .*; accepted: 0 to 1048576"):
        load_network_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("num_groups", "4"), ("latent_size", "ab"), ("patch_size", [1]), ("vlm_config", 5)]
)
def test_a_setting_of_another_type_names_the_file(vlm, tmp_path, name, value):
    make_config(vlm).save_pretrained(tmp_path)
    change(tmp_path / "config.json", name, value)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: damaged"):
        load_network_config(tmp_path)


# --- tensors ----------------------------------------------------------------------------------------------------------------

TENSORS = {
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch.sparse_csr": torch.Tensor.to_sparse_csr,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "meta": lambda t: t.to("meta"),
    "torch.complex64": lambda t: t.to(torch.complex64),
    "torch.float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's, about these tensors
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_another_kind_is_named(tmp_path, kind):
    file = tmp_path / "weights.pt"
    torch.save({"model": {"norm": torch.ones(2), "layer.weight": TENSORS[kind](torch.eye(2))}}, file)
    message = rf"{file}: model\.layer\.weight is a {kind} tensor; accepted: dense"
    with pytest.raises(ValueError, match=message):
        open_weights(file)
    with pytest.raises(ValueError, match=message):  # where DeepSpeed reads its own files
        TolerantCheckpointEngine().load(str(file))


# --- the tokenizer's chat template and the prompts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", r"chat template: .*\(TemplateError: no\)"),
        ("{% for", "chat template: .*TemplateSyntaxError"),
        ("{{ a.b.c }}", "chat template: .*UndefinedError"),
        ("{{ 1 / 0 }}", "chat template: .*ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template: .*RecursionError"),
        ("", "prompts: 0 tokens in the tokenizer's chat format; accepted: 1 to"),
    ],
)
def test_a_chat_template_that_fails_or_writes_nothing(template, message):
    tokenizer = build_tiny_tokenizer(["a cat"], 512)
    check_chat_template(tokenizer)
    tokenizer.chat_template = template
    for read in (check_chat_template, lambda tokenizer: tokenize_prompts(tokenizer, ["a cat"])):
        with pytest.raises(ArgumentError, match=message):
            read(tokenizer)


def test_a_chat_template_that_writes_too_much_is_not_tokenized(monkeypatch):
    tokenizer = build_tiny_tokenizer(["a cat"], 512)
    tokenizer.chat_template = "{{ 'x' * 2000000 }}"
    monkeypatch.setattr(type(tokenizer), "encode", None)
    with pytest.raises(ArgumentError, match="chat template: writes 2000000 characters; accepted: 1048576"):
        check_chat_template(tokenizer)


@pytest.mark.parametrize("limit", [None, 4])
def test_a_prompt_that_is_not_utf8_is_refused(limit):
    tokenizer, prompt = build_tiny_tokenizer(["a cat"], 512), b"caf\xe9".decode(errors="surrogateescape")
    with pytest.raises(ArgumentError, match=r"prompts: got 'caf\\udce9'; accepted: text in UTF-8"):
        tokenize_prompts(tokenizer, truncate_prompts(tokenizer, [prompt], limit))


# --- what the operating system refuses --------------------------------------------------------------------------------------


def raising(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; accepted: a path that this user"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; accepted: a file system that"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "nnn"), "nnn: File name too long; accepted: a shorter name"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x", None, "y"), "x -> y: Is a directory; accepted: a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left on device; accepted: a disk with free space"),
        (OSError(errno.EFBIG, "File too large"), "a file: File too large; accepted: a higher limit on the size"),
        (RuntimeError("unexpected pos 64 vs 0"), "a file could not be written (unexpected pos 64 vs 0); accepted: free space"),
        (SafetensorError("Error while serializing: I/O error: File too large"), "a file could not be written (Error while"),
        (MemoryError(), "memory ran out (MemoryError); accepted: more memory"),
        (MemoryError("Unable to allocate 9 TiB"), "memory ran out (Unable to allocate 9 TiB); accepted: more memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99"), "memory ran out ([enforce"),
    ],
)  # fmt: skip
def test_what_the_operating_system_refuses_is_one_line(capsys, monkeypatch, error, line):
    assert exit_code(raising(error)) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    monkeypatch.setenv(errors.TRACEBACK, "1")
    assert exit_code(raising(error)) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), KeyError("a bug"), RuntimeError("a bug"), OSError("a bug"), ConnectionError(104, "x")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_code(raising(error))


# --- the launch -------------------------------------------------------------------------------------------------------------

LAUNCH = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"RANK": None}, "RANK not set"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "LOCAL_RANK, MASTER_PORT not set"),
        ({"RANK": "x", "LOCAL_RANK": "-1"}, "RANK, LOCAL_RANK out of range"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT out of range"),
        ({"RANK": "1"}, "RANK out of range"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK, WORLD_SIZE not set"),
    ],
)
def test_variables_of_a_launcher_left_in_the_shell(monkeypatch, capsys, changes, named):
    for name, value in (LAUNCH | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=rf"environment: .*, but {named}; accepted: all as a launcher sets them, or none"
    ):
        start_alone_without_launcher()
    assert exit_code(start_alone_without_launcher) == 2  # which reads RANK too
    assert named in capsys.readouterr().err


def test_all_variables_of_a_launcher_or_none(monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    start_alone_without_launcher()
    assert {name: os.environ[name] for name in LAUNCH} == LAUNCH
    for name in LAUNCH:
        monkeypatch.delenv(name)
    start_alone_without_launcher()
    assert os.environ["WORLD_SIZE"] == "1"


def test_a_device_that_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command_line.find_device(None) == command_line.find_device("cpu") == "cpu"
    for device in ("cuda", "gpu", "cuda:x", "meta"):
        with pytest.raises(UserError, match=rf"device: '{device}' is not on this machine; accepted: cpu$"):
            command_line.find_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command_line.find_device(None) == "cuda:1"
    assert command_line.find_device("cuda") == "cuda"
    with pytest.raises(UserError, match=r"device: 'cuda:7' .*; accepted: cpu, cuda, cuda:0, cuda:1$"):
        command_line.find_device("cuda:7")


# --- the output_dir ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "stop", "requeue", "run.lock", "model", "checkpoints"])
@pytest.mark.parametrize("odd", ["dangling", "other kind"])
def test_what_is_in_the_way_in_an_output_dir_is_named(tmp_path, name, odd):
    path, kind = tmp_path / name, "folder" if name in ("model", "checkpoints") else "file"
    if odd == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(UserError, match=rf"output_dir: {path} is no {kind}; accepted: a {kind}, or nothing"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path)))


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "agree", lambda value: value)
    monkeypatch.setattr(run_lock, "is_first_rank", lambda: True)
    return RunLock(tmp_path / "run")


def test_an_output_dir_that_is_moved_removed_or_replaced_is_noticed(tmp_path, lock):
    run = tmp_path / "run"
    assert lock.folder_is_there()
    run.rename(tmp_path / "moved")
    assert not lock.folder_is_there()
    run.write_text("")
    assert not lock.folder_is_there()
    run.unlink()
    run.mkdir()  # another folder
    assert not lock.folder_is_there()
    run.rmdir()
    (tmp_path / "moved").rename(run)
    assert lock.folder_is_there()
    shutil.rmtree(run)
    run.mkdir()  # a file system may give it the number of the one before
    assert not lock.folder_is_there()
    lock.release()
    assert run.is_dir()


def test_a_lock_is_released_where_the_folder_was_moved_to(tmp_path, lock):
    (tmp_path / "run").rename(tmp_path / "moved")
    lock.release()
    assert not (tmp_path / "moved" / LOCK_FILE).exists()
    assert (tmp_path / "moved").is_dir()


def test_logs_do_not_bring_an_output_dir_back(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(tmp_path / "run", 0)
    writer.scalars(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    writer.scalars(2, {"loss": 1.0})
    writer.grid(2, torch.zeros(8, 8, dtype=torch.uint8).numpy())
    assert not (tmp_path / "run").exists()
    assert "metrics.jsonl could not be written" in capsys.readouterr().err
