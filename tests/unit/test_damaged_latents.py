"""Folders of latents, damaged: no bit of them is wrong without a word. And what a run records of its data."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.latents.dataset import state_fingerprint
from latte_flow.training.data.record import DataRecord
from latte_flow.training.errors import UserError
from tests.unit.test_damaged_data import DAMAGES, EIO_FILE, flip, loaded_by_a_worker, replace_by_link
from tests.unit.test_hostile_files import FILE_NAMES, HOSTILE, JSON_VALUES, JUNK, mutated, rearranged

IMAGES, SHARD = 1257, 500
CONFIG = DataConfig(dataset="latents", resolution=8, horizontal_flip=False)


def encode(folder: Path, source: Path | str = "digits") -> None:
    settings = {"codec": "pixel", "resolution": 8, "shard_size": SHARD, "num_workers": 0, "device": "cpu"}
    encode_latents(source=str(source), output=str(folder), **settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The digits as latents, mirrored ones too, in three files."""
    folder = tmp_path_factory.mktemp("latents") / "digits"
    encode(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "latents"))


def load(folder: Path, **fields):
    return load_image_dataset(dataclasses.replace(CONFIG, path=str(folder), **fields))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def test_a_whole_folder_is_whole(folder):
    latents = load(folder)
    assert len(latents) == IMAGES
    assert latents.damaged_shards(0, 1) == []


# --- at the start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "data-00001-of-00003.arrow"])
def test_a_damaged_file_is_named(folder, name, how):
    how(folder / name)
    with pytest.raises(UserError, match=rf"^data\.path: {folder}/.*{name}.*; accepted"):
        load(folder)


def some_bits(content: bytes) -> list[int]:
    return np.random.default_rng(0).choice(8 * len(content), 200, replace=False).tolist()


def test_every_flipped_bit_of_the_manifest_is_found(folder, original):
    whole = (original / "manifest.json").read_bytes()
    for bit in some_bits(whole):
        (folder / "manifest.json").write_bytes(whole)
        flip(folder / "manifest.json", bit // 8, bit % 8)
        with pytest.raises(UserError, match=rf"data\.path: {folder}/manifest\.json"):
            load(folder)


def test_a_flipped_bit_of_what_vouches_for_the_manifest_is_found_or_changes_nothing(folder, original):
    """Of state.json only the fingerprint is read here; the rest is for datasets."""
    whole, manifest = (original / "state.json").read_bytes(), load(original).manifest
    outcomes = set()
    for bit in some_bits(whole):
        (folder / "state.json").write_bytes(whole)
        flip(folder / "state.json", bit // 8, bit % 8)
        try:
            outcomes.add(load(folder).manifest == manifest)
        except UserError as error:
            outcomes.add("state.json" in str(error))
    assert outcomes == {True}


@settings(max_examples=60)
@given(shard=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_latents_is_found(original, tmp_path_factory, shard, place, bit):
    folder = tmp_path_factory.mktemp("flipped")
    for file in original.iterdir():
        os.link(file, folder / file.name)
    file = shards(folder)[shard]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    flip(file, int(place * len(content)), bit)
    try:
        problems = load(folder).damaged_shards(0, 1)
    except UserError as error:  # where it makes no sense at all
        problems = [str(error)]
    assert len(problems) == 1
    assert str(file) in problems[0]
    shutil.rmtree(folder)


def test_ranks_share_the_reading(folder):
    for file in shards(folder):
        flip(file, 30_000)
    latents = load(folder)
    said = "{} has another SHA-256 than manifest.json says"
    first, second, third = (said.format(file) for file in shards(folder))
    assert latents.damaged_shards(0, 2) == [first, third]
    assert latents.damaged_shards(1, 2) == [second]


def test_a_label_of_no_class_is_named(folder):
    """Negative ones would be another class's prompt, larger ones an error in the middle of the run."""
    file = shards(folder)[0]
    content = file.read_bytes()
    labels = np.asarray(load(folder).prompt_rows[:SHARD], dtype=np.int64).tobytes()
    flip(file, content.index(labels) + 7, 7)
    with pytest.raises(UserError, match=rf"data\.path: {file} is damaged \(labels -\d+ to 9 of 10 classes\)"):
        load(folder)


def test_a_caption_that_is_no_text_any_more_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pictures = {"image": [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(4)], "text": ["a cat", "a dog"] * 2}
    datasets.Dataset.from_dict(pictures, features).to_parquet(tmp_path / "a.parquet")
    encode(tmp_path / "latents", source=tmp_path / "a.parquet")
    (file,) = shards(tmp_path / "latents")
    assert len(load(tmp_path / "latents").prompts) == 2
    flip(file, file.read_bytes().index(b"a cata dog"), 7)
    with pytest.raises(UserError, match=rf"data\.path: {file} is damaged \(.*UTF8"):
        load(tmp_path / "latents")


def vouched(folder: Path, content: bytes) -> None:
    """Write a manifest, and a state.json that says that it is the right one."""
    (folder / "manifest.json").write_bytes(content)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_fingerprint": state_fingerprint(content)}))


def check_manifest(folder: Path, content: bytes) -> None:
    vouched(folder, content)
    with contextlib.suppress(UserError):
        latents = load(folder)
        assert latents.sample(IMAGES - 1, flip=False)["latent"].shape == (1, 8, 8)
        assert len(latents) == IMAGES
        assert {Path(latents.name, entry["file"]).parent for entry in latents.manifest["shards"]} == {folder}


def test_a_file_of_more_rows_than_the_manifest_says_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["num_images"] -= 1
    manifest["shards"][2]["rows"] -= 1
    vouched(folder, json.dumps(manifest).encode())
    with pytest.raises(UserError, match=rf"data\.path: {shards(folder)[2]} is damaged \(257 rows instead of 256\)"):
        load(folder)


@pytest.fixture(scope="module")
def mutable(original, tmp_path_factory):
    """A copy whose manifest is written again and again."""
    return Path(shutil.copytree(original, tmp_path_factory.mktemp("mutable") / "latents"))


@settings(max_examples=120, **HOSTILE)
@given(data=st.data())
def test_a_manifest_that_is_vouched_for_is_read_or_damaged(original, mutable, data):
    manifest = json.loads((original / "manifest.json").read_text())
    if data.draw(st.booleans()):
        manifest["shards"][1] = data.draw(rearranged(manifest["shards"][1], JUNK, FILE_NAMES))
    else:
        manifest = data.draw(rearranged(manifest, [*JUNK, manifest["shards"][:2]], FILE_NAMES))
    check_manifest(mutable, json.dumps(manifest).encode())


@settings(max_examples=80, **HOSTILE)
@given(data=st.data())
def test_a_damaged_manifest_is_read_or_damaged(original, mutable, data):
    check_manifest(mutable, data.draw(mutated([(original / "manifest.json").read_text()], JSON_VALUES)))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 10_000, "\x00"])
@pytest.mark.parametrize("name", ["settings.json", "data-00001-of-00003.json"])
def test_going_on_in_a_damaged_folder_names_the_file(folder, name, content):
    (folder / "manifest.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"output: {folder / name}: damaged .*; accepted: "):
        encode(folder)


# --- while a run is active ---------------------------------------------------------------------------------------------------


class Latents(torch.utils.data.Dataset):
    """(latent, row) of the last shard, as a data worker reads them."""

    def __init__(self, latents):
        self.latents = latents

    def __len__(self):
        return 40

    def __getitem__(self, index):
        sample = self.latents.sample(IMAGES - 40 + index, flip=False)
        return sample["latent"], sample["row"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda file: os.truncate(file, 4096), "was truncated while in use"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
        (lambda file: replace_by_link(file, EIO_FILE), "cannot be read: Input/output error"),
    ],
    ids=["cut-off", "removed", "input-output-error"],
)
@pytest.mark.parametrize("worker", [False, True], ids=["here", "in-a-worker"])
def test_a_file_that_goes_bad_after_the_start_is_named(folder, worker, how, reason):
    latents = Latents(load(folder))
    assert loaded_by_a_worker(latents) == 40
    file = shards(folder)[2]
    how(file)
    with pytest.raises(UserError, match=rf"data\.path: {file} {reason}.*; accepted: ") as error:
        loaded_by_a_worker(latents) if worker else latents[39]
    assert "last checkpoint" in str(error.value)


def test_a_file_in_use_may_be_removed_or_replaced(folder):
    latents = load(folder)
    before = latents.sample(3, flip=False)["latent"]
    shards(folder)[0].unlink()
    assert torch.equal(latents.sample(3, flip=False)["latent"], before)


# --- data.json -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def record(folder: Path, file: Path, *, allow_changed: bool = False) -> DataRecord:
    return DataRecord(load(folder), file, allow_changed=allow_changed)


def changed(folder: Path) -> None:
    """Make it another data set: the images of its first row are others."""
    manifest = json.loads((folder / "manifest.json").read_text())
    flip(shards(folder)[0], 30_000)
    manifest["shards"][0]["sha256"] = hashlib.sha256(shards(folder)[0].read_bytes()).hexdigest()
    vouched(folder, json.dumps(manifest).encode())


@pytest.mark.usefixtures("_one_process")
def test_latents_new_to_a_run_are_compared_with_their_sha256_and_those_on_record_are_not(folder, tmp_path):
    flip(shards(folder)[1], 30_000)
    file = tmp_path / "data.json"
    new = record(folder, file)
    assert new.is_new
    with pytest.raises(
        UserError,
        match=rf"data\.path: {shards(folder)[1]} has another SHA-256 than manifest.json says; accepted: delete",
    ):
        new.verify()
    new.update(0)
    again = record(folder, file)
    assert not again.is_new
    again.verify()  # reading hundreds of gigabytes at every start would cost more than it finds


def test_changed_data_are_refused_and_the_message_names_the_flag(folder, tmp_path):
    file = tmp_path / "data.json"
    record(folder, file).update(0)
    before = file.read_bytes()
    assert not record(folder, file).is_new
    changed(folder)
    with pytest.raises(
        UserError, match=rf"data\.path: {folder} has changed since this run was started .*--data\.allow_changed true"
    ):
        record(folder, file)
    assert file.read_bytes() == before


def test_changed_data_that_are_allowed_are_said_once_and_all_are_on_record(folder, tmp_path, capsys):
    file = tmp_path / "data.json"
    prints = [load(folder).fingerprint]
    record(folder, file, allow_changed=True).update(0)
    assert capsys.readouterr().out == ""
    for step in (7, 11):
        changed(folder)
        prints.append(load(folder).fingerprint)
        record(folder, file, allow_changed=True).update(step)
        said = capsys.readouterr().out
        assert prints[-2] in said
        assert prints[-1] in said
        assert f"step {step}" in said
        record(folder, file, allow_changed=True).update(step + 1)
        record(folder, file).update(step + 1)  # the flag is not needed any more
        assert capsys.readouterr().out == ""
    now = json.loads(file.read_text())
    assert len(set(prints)) == 3
    assert (now["name"], now["length"], now["fingerprint"]) == (str(folder), IMAGES, prints[2])
    assert [(entry["fingerprint"], entry["until_step"]) for entry in now["before"]] == [(prints[0], 7), (prints[1], 11)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", '{"fingerprint": 3}', '{"fingerprint": "x", "before": 3}']
)
def test_a_damaged_record_is_named(folder, tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/data\.json: damaged .*; accepted: "):
        record(folder, tmp_path / "data.json", allow_changed=True)
