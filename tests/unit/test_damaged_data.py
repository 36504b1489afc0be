"""Real data files, damaged: the error names the file, and no image is lost without a word. Of pictures, captions and latents."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.whole_files import END_OF_STREAM, MappedFiles
from latte_flow.training.errors import UserError, exit_code
from tests.emoji import EMOJI, needs_emoji, write_emoji

IMAGES = 24
EIO_FILE = "/proc/self/mem"
"""Reading this file of the kernel at its start is an I/O error."""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The first emoji, with their captions, as a data set of each kind."""
    if not EMOJI.is_file():
        pytest.skip(needs_emoji.kwargs["reason"])
    root = tmp_path_factory.mktemp("emoji")
    write_emoji(root / "parquet" / "a.parquet", IMAGES)
    shutil.rmtree(root / "parquet" / "cache")
    table = datasets.Dataset.from_parquet(str(root / "parquet" / "a.parquet"), cache_dir=str(root / "cache"))
    table.save_to_disk(root / "saved")
    (root / "imagefolder").mkdir()
    (root / "webdataset").mkdir()
    lines = []
    with tarfile.open(root / "webdataset" / "a.tar", "w") as tar:
        for i, row in enumerate(table.cast_column("image", datasets.Image(decode=False))):
            for name, content in ((f"{i:04d}.png", row["image"]["bytes"]), (f"{i:04d}.txt", row["text"].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            (root / "imagefolder" / f"{i:04d}.png").write_bytes(row["image"]["bytes"])
            lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": row["text"]}))
    (root / "imagefolder" / "metadata.jsonl").write_text("\n".join(lines))
    return root


FILES = {
    "parquet": ["a.parquet"],
    "webdataset": ["a.tar"],
    "saved": ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"],
    "imagefolder": ["metadata.jsonl"],
}


def copy_of(emoji: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emoji / kind, tmp_path / kind))


def load(kind: str, path: Path, **fields):
    return load_image_dataset(DataConfig(dataset=kind, path=str(path), resolution=64, **fields))


def flip(file: Path, position: int, bit: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def replace_by_link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut off to nothing": lambda file: cut(file, 0),
    "cut off in the middle": lambda file: cut(file, file.stat().st_size // 2),
    "a folder in its place": replace_by_folder,
    "a link to nothing": lambda file: replace_by_link(file, "/nowhere/at/all"),
    "an input/output error": lambda file: replace_by_link(file, EIO_FILE),
}
CASES = [
    pytest.param(kind, name, how, id=f"{kind}-{name}-{what}")
    for kind, names in FILES.items()
    for name in names
    for what, how in DAMAGES.items()
    if (name, what) != ("metadata.jsonl", "a folder in its place")  # a folder of images may hold such a folder
]
FLIPS = [
    pytest.param(kind, name, lambda file, at=at: flip(file, at), id=f"{kind}-{name}-bit of byte {at}")
    for kind, name, at in (
        ("parquet", "a.parquet", -6),  # length of the footer
        ("parquet", "a.parquet", -100),  # schema in the footer
        ("webdataset", "a.tar", 5),  # name in a header
        ("saved", "data-00000-of-00001.arrow", 5),  # length of the schema
        ("saved", "data-00000-of-00001.arrow", 200),  # features in the schema
        ("saved", "state.json", 5),  # name of the list of files
        ("saved", "state.json", 200),  # another name
        ("saved", "dataset_info.json", 0),
        ("imagefolder", "metadata.jsonl", 0),
    )
]


@pytest.mark.parametrize(("kind", "name", "how"), CASES + FLIPS)
def test_a_damaged_file_is_named(emoji, tmp_path, kind, name, how):
    folder = copy_of(emoji, kind, tmp_path)
    how(folder / name)
    with pytest.raises(UserError, match=rf"^data\.path: {folder / name} .*accepted: ") as error:
        load(kind, folder)
    assert len(str(error.value)) < 400


def test_a_picture_that_is_a_link_to_nothing_is_named(emoji, tmp_path):
    folder = copy_of(emoji, "imagefolder", tmp_path)
    replace_by_link(folder / "0003.png", "/nowhere/at/all")
    with pytest.raises(UserError, match=rf"data\.path: {folder}/0003.png cannot be read \(No such file"):
        load("imagefolder", folder)


@pytest.mark.parametrize("kind", ["saved", "webdataset"])
def test_a_caption_that_is_no_text_any_more_is_named(emoji, tmp_path, kind):
    folder = copy_of(emoji, kind, tmp_path)
    file = folder / FILES[kind][0]
    caption = load(kind, folder).captions[0].encode()
    flip(file, file.read_bytes().index(caption), 7)
    with pytest.raises(UserError, match=r"^data\.(path|text_column): .*accepted: ") as error:
        load(kind, folder)
    assert str(file if kind == "saved" else folder) in str(error.value)


def test_a_missing_file_of_a_saved_data_set_is_named(emoji, tmp_path):
    folder = copy_of(emoji, "saved", tmp_path)
    (folder / FILES["saved"][0]).unlink()
    with pytest.raises(UserError, match=rf"data\.path: {folder / FILES['saved'][0]} cannot be read \(No such file"):
        load("saved", folder)


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "saved"])
def test_a_flipped_bit_is_an_error_that_names_the_file_or_leaves_all_images_there(emoji, tmp_path, kind):
    """One in a header or among the offsets of a column must neither end the process nor shorten the data set."""
    draws = np.random.default_rng(0)
    outcomes = set()
    for number in range(12):
        folder = copy_of(emoji, kind, tmp_path / str(number))
        file = folder / FILES[kind][0]
        size = file.stat().st_size
        at = [draws.integers(size), draws.integers(3000), size - 1 - draws.integers(3000)][number % 3]
        flip(file, int(at), int(draws.integers(8)))
        try:
            images = load(kind, folder, max_broken_fraction=0.1)
            assert len(images) == IMAGES
            outcomes.update(tuple(images[i][0].shape) for i in range(IMAGES))
        except UserError as error:
            outcomes.add("named" if str(file) in str(error) else str(error))
    assert outcomes == {"named", (3, 64, 64)}


@pytest.mark.parametrize("damage", ["a header", "the end"])
def test_a_tar_file_that_looks_shorter_than_it_is_is_found_at_every_start(emoji, tmp_path, damage):
    """Readers take a damaged header for the end; datasets' copy of what they read would be taken for the whole later."""
    folder = copy_of(emoji, "webdataset", tmp_path)
    with tarfile.open(folder / "a.tar") as tar:
        member = tar.getmembers()[20]
    if damage == "a header":
        flip(folder / "a.tar", member.offset + 2)
    else:
        cut(folder / "a.tar", member.offset)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"data\.path: {folder}/a\.tar .* at byte {member.offset}"):
            load("webdataset", folder)


def test_whole_tar_files_are_looked_through_once(emoji, tmp_path, monkeypatch):
    folder = copy_of(emoji, "webdataset", tmp_path)
    assert len(load("webdataset", folder)) == IMAGES
    monkeypatch.setattr(tarfile, "open", None)
    assert len(load("webdataset", folder)) == IMAGES


@pytest.fixture
def validated(monkeypatch):
    """The tables that are read through, in order."""
    seen, validate = [], datasets.table.Table.validate
    monkeypatch.setattr(
        datasets.table.Table, "validate", lambda self, *, full: seen.append(self) or validate(self, full=full)
    )
    return seen


@pytest.mark.parametrize("kind", FILES)
def test_a_table_is_read_through_once_and_not_at_every_start(emoji, tmp_path, validated, kind):
    folder = copy_of(emoji, kind, tmp_path)
    for _ in range(3):
        assert len(load(kind, folder)) == IMAGES
    assert len(validated) == 1


@pytest.mark.parametrize("change", ["size", "modification time"])
def test_a_file_that_has_changed_is_read_through_again(emoji, tmp_path, validated, change):
    folder = copy_of(emoji, "saved", tmp_path)
    file = folder / FILES["saved"][0]
    caption = load("saved", folder).captions[0].encode()
    found = os.stat(file)
    flip(file, file.read_bytes().index(caption), 7)
    if change == "size":
        with file.open("ab") as stream:
            stream.write(END_OF_STREAM)
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(UserError, match=rf"data\.path: {file} .*accepted: "):
        load("saved", folder)
    assert len(validated) > 1


def test_of_several_ranks_one_reads_the_table_and_the_others_wait(emoji, tmp_path, monkeypatch):
    folder, calls = copy_of(emoji, "saved", tmp_path), tmp_path / "calls"
    validate = datasets.table.Table.validate

    def slow(self, *, full):
        with calls.open("a") as stream:
            stream.write("read\n")
        time.sleep(0.3)
        validate(self, full=full)

    monkeypatch.setattr(datasets.table.Table, "validate", slow)
    ranks = [multiprocessing.get_context("fork").Process(target=load, args=("saved", folder)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert calls.read_text() == "read\n"


def test_a_cache_that_cannot_be_written_has_tables_read_at_every_start(emoji, tmp_path, validated, monkeypatch):
    folder = copy_of(emoji, "saved", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere"))
    for _ in range(2):
        assert len(load("saved", folder)) == IMAGES
    assert len(validated) == 2


def test_a_saved_table_cut_off_between_two_batches_is_found(emoji, tmp_path):
    folder = copy_of(emoji, "saved", tmp_path)
    file = folder / FILES["saved"][0]
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 10))
        batch = sink.tell()
        writer.write_table(table.slice(10))
    file.write_bytes(sink.getvalue())
    assert len(load("saved", folder)) == IMAGES
    cut(file, batch)
    with pytest.raises(UserError, match=rf"data\.path: {file} is truncated"):
        load("saved", folder)


def test_a_damaged_copy_of_the_files_in_the_cache_is_said(emoji, tmp_path):
    folder = copy_of(emoji, "parquet", tmp_path)
    load("parquet", folder)
    for copy in datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"):
        cut(copy, 100)
    with pytest.raises(
        UserError, match=rf"{folder} cannot be read.*{datasets.config.HF_DATASETS_CACHE} may be damaged"
    ):
        load("parquet", folder)


# --- while a run is active ---------------------------------------------------------------------------------------------------


def loaded_by_a_worker(dataset) -> int:
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="fork")
    batches = iter(loader)
    try:
        return sum(len(rows) for _, rows in batches)
    finally:
        batches._shutdown_workers()  # at once, and not when pytest lets go of the error


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_mapped_file_that_is_cut_off_is_an_error_and_no_bus_error(emoji, tmp_path, kind):
    images = load(kind, copy_of(emoji, kind, tmp_path))
    roots = {"saved": tmp_path, "parquet": datasets.config.HF_DATASETS_CACHE}
    (file,) = roots[kind].rglob("*.arrow")
    os.truncate(file, 4096)
    with pytest.raises(UserError, match=rf"data\.path: {file} was truncated while in use; accepted: "):
        loaded_by_a_worker(images)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_mapped_file_that_is_removed_or_replaced_is_read_as_it_was(emoji, tmp_path, how):
    folder = copy_of(emoji, "saved", tmp_path)
    images = load("saved", folder)
    before = [images[i][0] for i in range(IMAGES)]
    file = folder / FILES["saved"][0]
    if how == "removed":
        file.unlink()
    else:
        (folder / "new").write_bytes(b"short")
        (folder / "new").replace(file)
    assert all(torch.equal(images[i][0], before[i]) for i in range(IMAGES))
    assert loaded_by_a_worker(images) == IMAGES


def test_a_mapped_file_on_a_file_system_that_went_away(tmp_path):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_bytes(b"content")
    mapped = MappedFiles([file], None)
    mapped.check(0)
    file.unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("no folder")  # ENOTDIR stands for the errors that a network file system has
    with pytest.raises(UserError, match=rf"data\.path: {file} cannot be read: Not a directory"):
        mapped.check(0)


def test_a_picture_that_is_removed_is_a_broken_one(emoji, tmp_path):
    folder = copy_of(emoji, "imagefolder", tmp_path)
    images = load("imagefolder", folder)
    (folder / "0007.png").unlink()
    with pytest.raises(UserError, match=rf"data\.max_broken_fraction: 1 broken images .*{folder}/0007\.png"):
        loaded_by_a_worker(images)


class Deadly(torch.utils.data.Dataset):
    """Ends the process that reads it, as a bus error does, or the system when the memory is full."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), self.number)
        return 0, 0


@pytest.mark.parametrize(("number", "named"), [(signal.SIGBUS, "Bus error"), (signal.SIGKILL, "Killed")])
def test_a_data_worker_that_was_killed_is_said_in_one_line(capsys, number, named):
    assert exit_code(lambda: loaded_by_a_worker(Deadly(number))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    died = rf"(is killed by signal: {named}|exited unexpectedly)"  # as torch finds it, at once or a little later
    assert re.match(rf"error: data\.num_workers: a data worker {died}; .*data\.path", line)


def raise_user_error():
    raise UserError("field: a; accepted: b")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False)])
def test_the_traceback_of_a_user_error_is_printed_on_request(monkeypatch, capsys, value, shown):
    monkeypatch.setenv("LATTE_FLOW_TRACEBACK", value)
    assert exit_code(raise_user_error) == 2
    printed = capsys.readouterr().err
    assert ("in raise_user_error" in printed) == shown
    assert printed.endswith("error: field: a; accepted: b\n")


def test_ctrl_c_ends_a_program_in_one_line(capsys):
    assert exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="of mine"):
        exit_code(lambda: (_ for _ in ()).throw(RuntimeError("of mine")))


def test_of_the_mapped_files_only_the_one_of_the_row_is_looked_at(tmp_path):
    """There may be hundreds, on a network file system."""
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"content")
    mapped = MappedFiles(files, [3, 1, 2])
    files[1].write_bytes(b"cut")
    for row in (0, 2, 4, 5):
        mapped.check(row)
    with pytest.raises(UserError, match=rf"data\.path: {files[1]} was truncated while in use"):
        mapped.check(3)
