"""Class names from a file: ImageNet's own mapping with its duplicate names, and files that do not fit the classes."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.class_names import resolve_class_names
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.errors import UserError

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

SYNSETS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}
"""Lines of LOC_synset_mapping.txt: the two cranes are a bird and a machine, the two maillots tights and a swimsuit."""
NAMES = ["tench", "crane", "crane", "maillot", "maillot"]
SIDE = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two grey pictures a class, of a brightness of its own."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for number, wnid in enumerate(SYNSETS):
        (root / wnid).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (SIDE, SIDE), (50 * number,) * 3).save(root / wnid / f"{i}.png")
    return root


@pytest.fixture
def mapping(tmp_path):
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("".join(f"{wnid} {names}\n" for wnid, names in SYNSETS.items()))
    return file


def encode(pictures: Path, output: Path, class_names: Path) -> None:
    settings = {"codec": "pixel", "resolution": SIDE, "num_workers": 0, "device": "cpu", "flip": False, "shard_size": 4}
    encode_latents(source=str(pictures), output=str(output), class_names=str(class_names), **settings)


def test_imagenets_duplicate_names_are_encoded_and_every_class_keeps_its_prompt(pictures, mapping, tmp_path, caplog):
    encode(pictures, tmp_path / "latents", mapping)
    assert "crane, maillot" in caplog.text  # two classes each with one prompt: said, not refused
    fields = {"resolution": SIDE, "horizontal_flip": False, "prompt_template": "a {}"}
    for names in (None, str(mapping)):  # the file may be given again when training
        latents = load_image_dataset(
            DataConfig(dataset="latents", path=str(tmp_path / "latents"), class_names=names, **fields)
        )
        assert latents.class_names == NAMES
        for index in range(len(latents)):
            sample = latents.sample(index, flip=False)
            brightness = round(float(sample["latent"].float().mean() + 1) * 127.5 / 50)
            assert sample["row"] == brightness == index // 2
            assert latents.prompts[sample["row"]] == f"a {NAMES[index // 2]}"

    table = datasets.load_from_disk(str(tmp_path / "latents"))  # where names must differ
    assert table.features["label"].names == ["tench", "crane (1)", "crane (2)", "maillot (3)", "maillot (4)"]
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["class_names"] == NAMES


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda text: text.replace("n03126707 crane\n", ""), "has no name for n03126707"),
        (lambda text: text.replace("n03126707", "n03126708"), "has no name for n03126707"),  # as many lines as classes
        (lambda text: text.replace("n03126707 crane", "n03126707"), "has no name for n03126707"),
        (lambda text: text.replace("n0", "n1"), r"has no name for n01440764 and 4 more"),
    ],
)
def test_a_mapping_that_misses_a_class_is_refused_before_anything_is_encoded(
    pictures, mapping, tmp_path, changed, problem
):
    mapping.write_text(changed(mapping.read_text()))
    with pytest.raises(UserError, match=rf"^data\.class_names: .*mapping\.txt {problem}.*; accepted: "):
        encode(pictures, tmp_path / "latents", mapping)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_a_byte_order_mark_is_not_part_of_the_first_class(mapping, separator):
    mapping.write_text(mapping.read_text().replace(" ", separator, 1).replace("\n", "\r\n"), encoding="utf-8-sig")
    assert resolve_class_names(str(mapping), list(SYNSETS)) == NAMES
    mapping.write_text("eins\nzwei\n", encoding="utf-8-sig")
    assert resolve_class_names(str(mapping), ["1", "2"]) == ["eins", "zwei"]
    mapping.write_text("eins\nzwei\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"cannot be read: .*; accepted: a text file in UTF-8"):
        resolve_class_names(str(mapping), ["1", "2"])


@pytest.mark.parametrize(
    "names", [["cat (domestic)", "dog"], ["sports car", "steam train"], ["white cat", "black dog"], ["a", "a"]]
)
def test_one_name_per_line_may_begin_like_a_class(tmp_path, names):
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert resolve_class_names(str(tmp_path / "names.txt"), ["cat", "dog"]) == names
