"""data.dataset hf: what ``datasets.load_dataset`` loads, from folders of several forms or by a name on the hub."""

import json
import shutil
import socket
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.errors import UserError
from tests.emoji import EMOJI, needs_emoji
from tests.unit.test_sources import config, image_table, numbers_of, png, prompts_of

pytestmark = pytest.mark.usefixtures("own_datasets_cache")
CARD = """---
configs:
- config_name: few
  data_files: few.parquet
- config_name: many
  data_files:
  - split: train
    path: many.parquet
  - split: validation
    path: few.parquet
---
Two configurations, one of them with two splits.
"""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))


def write_csv(root):
    lines = [f"{i}.png,picture {i}" for i in range(4)]
    (root / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    for i in range(4):
        (root / f"{i}.png").write_bytes(png(i))


def write_json(root):
    """The pictures lie elsewhere, as paths in one column."""
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    for i in range(4):
        (elsewhere / f"{i}.png").write_bytes(png(i))
    rows = [{"image": str(elsewhere / f"{i}.png"), "caption": f"picture {i}"} for i in range(4)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_parquet(root):
    image_table().map(lambda row, i: {"caption": f"picture {i}"}, with_indices=True).to_parquet(root / "train.parquet")


def write_arrow(root):
    image_table().map(lambda row, i: {"caption": f"picture {i}"}, with_indices=True).save_to_disk(root / "saved")
    (file,) = (root / "saved").glob("*.arrow")
    file.rename(root / "train.arrow")
    shutil.rmtree(root / "saved")


def write_card(root):
    table = image_table()
    table.to_parquet(root / "many.parquet")
    table.select([2, 3]).to_parquet(root / "few.parquet")
    (root / "README.md").write_text(CARD)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("write", [write_csv, write_json, write_parquet, write_arrow])
def test_folders_of_files_in_the_formats_of_datasets(root, write):
    write(root)
    images = load_image_dataset(config("hf", root))
    assert numbers_of(images) == [0, 1, 2, 3]
    assert prompts_of(images) == [f"Generate an image of picture {i}." for i in range(4)]


def test_a_dataset_card_names_configurations_and_splits(root):
    write_card(root)
    found = {}
    for subset, split in (("few", "train"), ("many", "train"), ("many", "validation"), ("many", "train[:1]")):
        images = load_image_dataset(config("hf", root, subset=subset, split=split))
        found[subset, split] = numbers_of(images), images.fingerprint
    assert [numbers for numbers, _ in found.values()] == [[2, 3], [0, 1, 2, 3], [2, 3], [0]]
    assert len({digest for _, digest in found.values()}) == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, r"data\.path: .*pick one among the available configs: \['few', 'many'\].*accepted: .* as data\.subset"),
        ({"subset": "all"}, r"data\.path: .*'all' not found.*\['few', 'many'\].*accepted: "),
        ({"subset": "many", "split": "test"}, r"data\.split: 'test' is not in .*accepted: train, validation, a part"),
    ],
)
def test_an_unknown_split_or_configuration_is_an_error_that_lists_them(root, fields, words):
    write_card(root)
    with pytest.raises(UserError, match=words):
        load_image_dataset(config("hf", root, **fields))


@needs_emoji
def test_the_captioned_emoji():
    images, held_out = (load_image_dataset(config("hf", EMOJI.parent, split=s)) for s in ("train", "validation"))
    table = datasets.load_dataset("parquet", data_files=str(EMOJI), split="train")
    assert (len(images), prompts_of(images)[3]) == (len(table), f"Generate an image of {table[3]['text']}.")
    assert 0 < len(held_out) < len(images)


def test_the_fingerprint_changes_with_the_data_and_not_with_its_place(root, tmp_path):
    write_csv(root)
    first = load_image_dataset(config("hf", root)).fingerprint
    moved = shutil.copytree(root, tmp_path / "moved")
    assert load_image_dataset(config("hf", moved)).fingerprint == first
    (moved / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("picture 3", "picture 4"))
    assert load_image_dataset(config("hf", moved)).fingerprint != first


def test_latents_are_encoded_from_a_split(root, tmp_path):
    write_card(root)
    output = tmp_path / "latents"
    data = {"source": str(root), "dataset": "hf", "subset": "many", "split": "validation"}
    encode_latents(**data, output=str(output), codec="pixel", resolution=8, num_workers=0, device="cpu")
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["num_images"], manifest["source"]["path"]) == (2, str(root))


# --- the hub ---------------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub_offline_is_one_clear_line(monkeypatch):
    for library in (
        datasets.config,
        huggingface_hub.constants,
    ):  # otherwise the connection is tried again for 20 seconds
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data\.path: nobody/nothing: Couldn't reach 'nobody/nothing' on the Hub"):
        load_image_dataset(config("hf", "nobody/nothing"))


@pytest.mark.parametrize("name", ["data/nothing", "parquet", "/nowhere/at/all", "a/b/c", "./a"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(root, name, monkeypatch):
    monkeypatch.chdir(root.parent)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("was looked for"))
    with pytest.raises(UserError, match=rf"^data\.path: {name} not found; accepted: a folder that .*, or OWNER/NAME"):
        load_image_dataset(config("hf", name))


def test_a_name_on_the_hub_is_identified_by_its_commit(root, monkeypatch):
    write_parquet(root)
    asked, here, commits = [], datasets.load_dataset_builder, ["0123abcd", "4567cdef", "0123abcd"]

    def from_hub(path, subset):
        asked.append((path, subset))
        builder = here(str(root))
        builder.hash = commits[len(asked) - 1]
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", from_hub)
    fingerprints = set()
    for _ in commits:
        images = load_image_dataset(config("hf", "owner/name", subset="small"))
        assert numbers_of(images) == [0, 1, 2, 3]
        fingerprints.add(images.fingerprint)
    assert asked == [("owner/name", "small")] * 3
    assert len(fingerprints) == 2


# --- what is refused -------------------------------------------------------------------------------------------------------


def test_a_folder_that_refers_to_files_elsewhere_is_refused(root, monkeypatch):
    write_parquet(root)
    files = {"train": ["hf://datasets/owner/name@main/train.parquet"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    with pytest.raises(UserError, match=r"data\.path: .* refers to hf://.*accepted: a folder that holds its own files"):
        load_image_dataset(config("hf", root))


def test_code_in_a_data_set_is_not_run(root):
    write_parquet(root)
    (root / "data.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=r"data\.path: .*scripts are no longer supported.*accepted: "):
        load_image_dataset(config("hf", root))


def test_a_folder_of_save_to_disk_and_a_file_name_the_source_that_reads_them(root):
    image_table().save_to_disk(root / "saved")
    (root / "a.txt").touch()
    for path in ("saved", "a.txt"):
        with pytest.raises(UserError, match=r"accepted with data\.dataset hf: .*for a folder of save_to_disk, .*saved"):
            load_image_dataset(config("hf", root / path))


def test_a_damaged_file_is_named(root):
    write_parquet(root)
    file = root / "train.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=rf"^data\.path: {file} cannot be read .*accepted: an intact copy"):
        load_image_dataset(config("hf", root))
