"""Folders that datasets would skip without a word, which would give the classes after them other numbers."""

from pathlib import Path

import pytest
from PIL import Image

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.errors import UserError

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


@pytest.fixture
def root(tmp_path):
    """Three classes, of which the second is for the tests to spoil."""
    for name in ("ant", "bee", "cat"):
        picture(tmp_path / "data" / name / "0.png")
    return tmp_path / "data"


def load(root: Path):
    return load_image_dataset(DataConfig(dataset="imagefolder", path=str(root), resolution=8))


def test_a_link_to_nothing_in_place_of_a_class_is_named(root):
    (root / "bee").rename(root.parent / "elsewhere")
    (root / "bee").symlink_to(root.parent / "nowhere")
    with pytest.raises(UserError, match=rf"^data\.path: {root / 'bee'} cannot be read \(No such file"):
        load(root)


def test_a_folder_without_pictures_is_reported(root, caplog):
    """Such as one whose archive was not extracted; a note above the classes is no class."""
    (root / "bee" / "0.png").rename(root / "bee" / "bee.tar")
    (root / "readme.txt").write_text("three classes")
    assert load(root).class_names == ["ant", "cat"]
    reported = f"{root / 'bee'} holds no picture: it is not one of the classes"
    assert [record.message for record in caplog.records] == [reported]


@pytest.mark.parametrize("linked", [False, True])
def test_hidden_folders_are_no_classes_linked_or_not(root, linked, caplog):
    for name in (".thumbnails", "__MACOSX", "lost+found"):
        folder = root.parent / name if linked else root / name
        picture(folder / "deep" / "0.png") if name != "lost+found" else folder.mkdir()
        if linked:
            (root / name).symlink_to(folder)
    (root / ".data").symlink_to(root)
    assert load(root).class_names == ["ant", "bee", "cat"]
    assert not caplog.records


def test_links_to_pictures_and_to_the_data_are_followed(root):
    (root / "ant" / "1.png").symlink_to(root / "cat" / "0.png")
    (root.parent / "link").symlink_to(root)
    for path in (root, root.parent / "link"):
        assert (load(path).class_names, len(load(path))) == (["ant", "bee", "cat"], 4)


def test_folders_beside_captions_need_no_pictures(root, caplog):
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("three captions")
    lines = [f'{{"file_name": "{name}/0.png", "text": "a {name}"}}\n' for name in ("ant", "bee", "cat")]
    (root / "metadata.jsonl").write_text("".join(lines))
    assert list(load(root).captions) == ["a ant", "a bee", "a cat"]
    assert not caplog.records
