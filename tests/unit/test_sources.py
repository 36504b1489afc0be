"""Image sources: each layout gives the same pictures in a defined order, broken ones are counted, errors name the field."""

import errno
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latte_flow.model.images import to_uint8
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.class_names import imagenet_names, resolve_class_names
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.images import BrokenImageError, center_crop, decode_image
from latte_flow.training.data.sources import detect_dataset
from latte_flow.training.errors import UserError

SIDE = 8
CLASSES = ("cat", "test", "train")  # two of them are names of splits to datasets


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def write_folders(root, classes=CLASSES, each=3):
    """Image c x each + i, of class c, in ROOT/class/i.png."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png(c * each + i))
    return root


def config(dataset, path, **fields):
    return DataConfig(dataset=dataset, path=str(path), resolution=SIDE, **fields)


def numbers_of(images) -> list[int]:
    """Return which of the numbered pictures a data set holds, in its order."""
    known = {picture(i).tobytes(): i for i in range(40)}
    return [known[to_uint8(images[i][0][None])[0].tobytes()] for i in range(len(images))]


def prompts_of(images) -> list[str]:
    return [images.prompts[images[i][1]] for i in range(len(images))]


def test_image_folder_is_read_as_one_split_in_order_of_classes_and_names(tmp_path):
    images = load_image_dataset(config("imagefolder", write_folders(tmp_path / "data")))
    assert numbers_of(images) == list(range(9))
    assert images.class_names == list(CLASSES)
    assert prompts_of(images) == [f"Generate an image of {CLASSES[i // 3]}." for i in range(9)]


def test_image_folder_with_captions(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for i in range(2):
        (root / f"{i}.png").write_bytes(png(i))
    lines = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(2)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = load_image_dataset(config("imagefolder", root))
    assert numbers_of(images) == [0, 1]
    assert images.class_names is None
    assert prompts_of(images) == ["Generate an image of picture 0.", "Generate an image of picture 1."]


def rows(count=4):
    return {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "caption": [f"c{i % 2}" for i in range(count)],
    }


def image_table():
    return datasets.Dataset.from_dict(
        rows(), datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    )


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_with_captions(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "saved":
        image_table().save_to_disk(path)
    else:
        path.mkdir()
        image_table().to_parquet(path / "a.parquet")
    images = load_image_dataset(config(kind, path))
    assert numbers_of(images) == [0, 1, 2, 3]
    assert list(images.prompts) == ["Generate an image of c0.", "Generate an image of c1."]
    assert list(images.prompt_rows) == [0, 1, 0, 1]
    assert detect_dataset(path) == kind


def write_tar(path, first, count, text=".txt"):
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            for name, content in ((f"{i:04d}.png", png(i)), (f"{i:04d}{text}", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars_in_order_of_their_names(tmp_path):
    write_tar(tmp_path / "b.tar", 3, 3)
    write_tar(tmp_path / "a.tar", 0, 3)
    images = load_image_dataset(config("webdataset", tmp_path))
    assert numbers_of(images) == list(range(6))
    assert prompts_of(images)[:2] == ["Generate an image of 0.", "Generate an image of 1."]
    assert detect_dataset(tmp_path) == "webdataset"


def test_webdataset_classes_are_named_by_a_file(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3, text=".cls")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    images = load_image_dataset(config("webdataset", tmp_path, class_names=str(tmp_path / "names.txt")))
    assert prompts_of(images) == [f"Generate an image of {name}." for name in ("tench", "goldfish", "tench")]


# --- class names -----------------------------------------------------------------------------------------------------------


WNIDS = [f"n{i:08d}" for i in range(1000)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("imagenet") / "train", WNIDS, each=1)


def test_imagenet_folders_get_imagenets_names(imagenet, caplog):
    images = load_image_dataset(config("imagefolder", imagenet))
    assert images.class_names == imagenet_names()
    assert images.prompts[images.prompt_rows[417]] == "Generate an image of balloon."
    assert not caplog.records


def test_imagenets_names_are_torchvisions():
    """The list in torchvision 0.29.1's weight metadata, joined by line ends."""
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert (names[0], names[134], names[517], names[999]) == ("tench", "crane bird", "crane", "toilet tissue")
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == (
        "0b0f9fee7c952f257418d62aa701f023a9da13b443a14f5c4291e5724d92967c"
    )


def test_imagenets_names_can_be_asked_for_and_need_1000_classes():
    numbers = [str(i) for i in range(1000)]
    assert resolve_class_names("imagenet-1k", numbers) == imagenet_names()
    assert resolve_class_names(None, numbers) == numbers
    with pytest.raises(UserError, match=r"data\.class_names: imagenet-1k has 1000 classes, the data has 2"):
        resolve_class_names("imagenet-1k", ["cat", "dog"])


def test_a_subset_of_imagenet_takes_its_names_from_the_synset_file(tmp_path, caplog):
    root = write_folders(tmp_path / "data", ["n01440764", "n01443537"])
    images = load_image_dataset(config("imagefolder", root))
    assert images.class_names == ["n01440764", "n01443537"]
    assert "LOC_synset_mapping.txt" in caplog.text
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n"
    )
    assert load_image_dataset(config("imagefolder", root, class_names=str(file))).class_names == ["tench", "goldfish"]
    file.write_text("tench\n")
    with pytest.raises(UserError, match=r"data\.class_names: .* has 1 lines for 2 classes"):
        load_image_dataset(config("imagefolder", root, class_names=str(file)))


# --- cropping --------------------------------------------------------------------------------------------------------------


def test_center_crop_leaves_a_picture_of_the_right_size_as_it_is():
    assert center_crop(picture(0, 16), 16).tobytes() == picture(0, 16).tobytes()


def test_center_crop_averages_boxes_and_takes_the_middle():
    # 16 x 8 to 4: one halving averages 2 x 2 boxes, no resize is left, the middle 4 of 8 columns stay.
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    halved = pixels.reshape(4, 2, 8, 2, 3).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 4), dtype=float)
    assert np.abs(cropped - halved[:, 2:6]).max() <= 1  # Pillow rounds after rows and after columns


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (64, 64), (16, 300), (5, 3), (31, 31), (32, 33)])
def test_center_crop_gives_the_square_asked_for(size):
    image = center_crop(Image.new("RGB", size, (10, 20, 30)), 16)
    assert image.size == (16, 16)
    assert (np.asarray(image) == (10, 20, 30)).all()


def test_center_crop_halves_before_the_bicubic_resize():
    image = picture(0, 50)
    by_hand = image.resize((25, 25), Image.Resampling.BOX).resize((16, 16), Image.Resampling.BICUBIC)
    assert center_crop(image, 16).tobytes() == by_hand.tobytes()


# --- broken images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_three_channels(mode):
    stream = io.BytesIO()
    image = Image.new(mode, (9, 12)) if mode != "P" else picture(0, 12).convert("P")
    image.save(stream, "TIFF")
    assert decode_image({"bytes": stream.getvalue(), "path": None}, SIDE).shape == (3, SIDE, SIDE)


def test_damaged_bytes_are_an_image_or_a_broken_image_and_nothing_else():
    generator = np.random.default_rng(0)
    outcomes = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        stream = io.BytesIO()
        picture(0, 24).save(stream, kind)
        whole = stream.getvalue()
        for _ in range(60):
            damaged = bytearray(whole[: generator.integers(0, len(whole) + 1)])
            for position in generator.integers(0, max(len(damaged), 1), generator.integers(0, 8)):
                if damaged:
                    damaged[position] = generator.integers(256)
            try:
                outcomes.add(tuple(decode_image({"bytes": bytes(damaged), "path": None}, SIDE).shape))
            except BrokenImageError:
                outcomes.add("broken")
    assert outcomes == {(3, SIDE, SIDE), "broken"}


def encoded(image: Image.Image, kind: str = "PNG") -> dict:
    """Return a picture as a column of images holds it."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (12_000, 12_000)])
def test_a_picture_of_an_absurd_shape_is_broken_before_it_is_decoded(size, monkeypatch):
    value = encoded(Image.new("1", size))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("was scaled"))
    with pytest.raises(BrokenImageError, match=rf"{size[0]} x {size[1]} pixels; accepted: aspect ratios up to 50"):
        decode_image(value, 256)


def test_deep_pictures_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    expected = decode_image(encoded(Image.fromarray(np.rint(ramp * 255).astype(np.uint8))), SIDE)
    sixteen = Image.fromarray(np.rint(ramp * 65535).astype(np.uint16))
    for value in (encoded(sixteen), encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF")):
        assert (decode_image(value, SIDE) - expected).abs().max() <= 1 / 127.5
    for wrong in (ramp * 1000, ramp - 1, ramp * np.nan):
        with pytest.raises(BrokenImageError, match=r"mode F with values from"):
            decode_image(encoded(Image.fromarray(wrong.astype(np.float32)), "TIFF"), SIDE)


def test_transparency_is_dropped():
    colour = (200, 40, 90)
    seen = decode_image(encoded(Image.new("RGBA", (SIDE, SIDE), (*colour, 0))), SIDE)
    assert torch.equal(seen, decode_image(encoded(Image.new("RGB", (SIDE, SIDE), colour)), SIDE))


def test_postscript_under_the_name_of_a_picture_is_not_run(tmp_path, monkeypatch):
    file = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 8)).save(file, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for value in ({"bytes": None, "path": str(file)}, {"bytes": file.read_bytes(), "path": None}):
        with pytest.raises(BrokenImageError, match=r"cannot identify"):
            decode_image(value, SIDE)


@pytest.mark.parametrize("path", ["https://example.org/a.png", "zip://a.png::/tmp/a.zip", "/dev/stdin", "/tmp"])
def test_only_regular_local_files_are_opened(path):
    with pytest.raises(BrokenImageError, match=r"is not a regular file; accepted: bytes, or the path of a local file"):
        decode_image({"bytes": None, "path": path}, SIDE)


def labelled(folder: Path, labels: list[int], names: list[str] | None) -> DataConfig:
    """Write a Parquet file of pictures with numbers for classes, which datasets does not check when it reads them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [encoded(picture(i, SIDE)) for i in range(len(labels))], "label": labels}
    file = folder / "train.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(file)
    if names:
        table = pq.read_table(file)
        declared = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        metadata = {"huggingface": json.dumps({"info": {"features": declared.to_dict()}})}
        pq.write_table(table.replace_schema_metadata(metadata), file)
    return DataConfig(dataset="parquet", path=str(file), resolution=SIDE, max_broken_fraction=0.3)


def test_a_label_outside_the_classes_costs_its_row(tmp_path):
    images = load_image_dataset(labelled(tmp_path, [0, 1, 2, 0], ["cat", "dog"]))
    assert len(images.prompts) == 2
    image, row = images[2]
    assert row == 0
    assert torch.equal(image, images[3][0])
    assert images.reason_broken(2) == "class 2; accepted: 0 to 1"


def test_an_absurd_class_is_refused_before_prompts_are_made(tmp_path):
    config = labelled(tmp_path, [0, 10**9, 1], None)
    with pytest.raises(
        UserError, match=r"data.text_column: label of row 1 of .* is class 1000000000; accepted: less than"
    ):
        load_image_dataset(config)


def test_a_linked_class_folder_is_a_class_like_the_others(tmp_path):
    root = write_folders(tmp_path / "data")
    elsewhere = tmp_path / "disk"
    middle = sorted(CLASSES)[1]
    (root / middle).rename(elsewhere)
    whole = {prompt: set() for prompt in CLASSES}
    (root / middle).symlink_to(elsewhere)
    images = load_image_dataset(config("imagefolder", root, prompt_template="{}"))
    for number, prompt in zip(numbers_of(images), prompts_of(images), strict=True):
        whole[prompt].add(number)
    assert whole == {name: {3 * c, 3 * c + 1, 3 * c + 2} for c, name in enumerate(CLASSES)}


def test_a_class_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    root, scandir = write_folders(tmp_path / "data"), os.scandir

    def denied(path):  # permissions do not apply to root, who may run these tests
        if Path(path) == root / CLASSES[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=f"data.path: {root / CLASSES[0]} cannot be listed: Permission denied"):
        load_image_dataset(config("imagefolder", root))


def test_folders_that_appear_twice_and_empty_ones_are_reported(tmp_path, caplog):
    root = write_folders(tmp_path / "data")
    (root / "empty").mkdir()
    assert load_image_dataset(config("imagefolder", root)).class_names == sorted(CLASSES)
    assert [record.message for record in caplog.records] == [f"{root / 'empty'} is empty: it is not one of the classes"]
    (root / "twice").symlink_to(root / CLASSES[0])
    with pytest.raises(UserError, match=r"data\.path: .* are the same folder; accepted: each folder once"):
        load_image_dataset(config("imagefolder", root))


def with_broken(tmp_path, *broken, total=9):
    root = write_folders(tmp_path / "data")
    files = sorted(root.glob("*/*.png"))
    for index in broken:
        files[index].write_bytes(png(index)[: 40 + index])
    return root, files


def test_a_broken_image_is_replaced_by_the_next_good_one_with_its_prompt_and_logged_once(tmp_path, caplog):
    root, files = with_broken(tmp_path, 2, 3, 8)
    images = load_image_dataset(config("imagefolder", root, max_broken_fraction=0.4))
    for _ in range(2):
        assert numbers_of(images) == [0, 1, 4, 4, 4, 5, 6, 7, 0]
    assert prompts_of(images)[2] == "Generate an image of test."
    assert prompts_of(images)[8] == "Generate an image of cat."
    assert images.broken.nonzero().flatten().tolist() == [2, 3, 8]
    assert len(caplog.records) == 3
    for record, index in zip(caplog.records, (2, 3, 8), strict=True):
        assert str(files[index]) in record.message


def test_replacements_do_not_depend_on_the_order_of_access(tmp_path):
    root, _ = with_broken(tmp_path, 2, 3)
    images = load_image_dataset(config("imagefolder", root, max_broken_fraction=0.4))
    assert [images.fetch(i)[1] for i in (3, 2, 4, 1)] == [4, 4, 4, 1]


def test_too_many_broken_images_are_an_error_that_counts_and_names_the_last(tmp_path):
    root, files = with_broken(tmp_path, 2, 3)
    images = load_image_dataset(config("imagefolder", root, max_broken_fraction=0.2))  # 1.8 of 9
    assert images.max_broken == 1
    with pytest.raises(
        UserError, match=rf"data\.max_broken_fraction: 2 broken images .*{files[3].name}.*at most 1 of 9"
    ):
        images.fetch(2)


def test_broken_images_are_counted_over_all_worker_processes(tmp_path):
    root, _ = with_broken(tmp_path, 2, 7)
    images = load_image_dataset(config("imagefolder", root, max_broken_fraction=0.3))
    loader = torch.utils.data.DataLoader(images, batch_size=1, num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 9
    assert images.broken.sum() == 2


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["imagefolder", "parquet", "webdataset", "saved", "latents"])
def test_a_missing_path_is_an_error_of_data_path(tmp_path, dataset):
    with pytest.raises(UserError, match=r"data\.path: .*nowhere.* not found"):
        load_image_dataset(config(dataset, tmp_path / "nowhere"))


@pytest.mark.parametrize("dataset", ["imagefolder", "parquet", "webdataset", "saved", "latents"])
def test_an_empty_folder_is_an_error_of_data_path(tmp_path, dataset):
    with pytest.raises(UserError, match=r"data\.path: "):
        load_image_dataset(config(dataset, tmp_path))


def test_zero_rows_are_an_error(tmp_path):
    image_table().select([]).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.path: .* holds zero images"):
        load_image_dataset(config("saved", tmp_path / "data"))


def test_several_splits_are_an_error_that_names_them(tmp_path):
    datasets.DatasetDict({"train": image_table(), "test": image_table()}).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.path: .*accepted: one of .*/data/train, .*/data/test"):
        load_image_dataset(config("saved", tmp_path / "data"))


@pytest.mark.parametrize("field", ["image_column", "text_column"])
def test_an_unknown_column_is_an_error_that_lists_the_columns(tmp_path, field):
    image_table().save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=rf"data\.{field}: .*other.*image"):
        load_image_dataset(config("saved", tmp_path / "data", **{field: "other"}))


def test_a_row_without_a_caption_is_an_error(tmp_path):
    table = rows() | {"caption": ["a", None, "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.text_column: caption of row 1 .* is None"):
        load_image_dataset(config("saved", tmp_path / "data"))


# --- what a run records ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path):
    first = load_image_dataset(config("imagefolder", write_folders(tmp_path / "a" / "data")))
    again = load_image_dataset(config("imagefolder", write_folders(tmp_path / "b" / "data")))
    assert first.fingerprint == again.fingerprint
    (tmp_path / "b" / "data" / "cat" / "9.png").write_bytes(png(9))
    changed = load_image_dataset(config("imagefolder", tmp_path / "b" / "data"))
    assert changed.fingerprint != first.fingerprint
