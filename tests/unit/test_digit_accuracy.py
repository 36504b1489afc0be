"""Scoring generated digits: real ones score as real ones, wrong labels as chance, wrong files are named."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import recall_score
from sklearn.svm import SVC

from latte_flow.tools.digit_accuracy import digit_accuracy, fit_classifier, read_samples, run
from latte_flow.training.data.sources.digits import digits_split
from latte_flow.training.errors import UserError


def write_samples(folder, images, classes) -> None:
    """Write pictures 0 to 16 as tools/sample.py does: 8-bit grey PNGs and an index of them."""
    lines = []
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / f"{i:06d}.png")
        lines.append(json.dumps({"file": f"{i:06d}.png", "class": int(label), "seed": 0}) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def held_out():
    digits, (_, indices) = load_digits(), digits_split()
    return digits.images[indices], digits.target[indices]


@pytest.fixture(scope="module")
def real(held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_samples(folder, *held_out)
    return folder


def test_real_held_out_digits_score_as_the_classifier_does(real, held_out):
    report = digit_accuracy(real)
    assert report["num_samples"] == len(held_out[1]) == 540
    assert report["accuracy"] > 0.98
    # bytes round the 17 levels of a pixel by at most 0.03 of one: at most a picture or two may tip over
    assert report["accuracy"] == pytest.approx(report["accuracy_on_held_out_real_digits"], abs=2 / 540)


def test_classifier_is_an_svm_of_the_training_part(held_out):
    digits, (train, _) = load_digits(), digits_split()
    expected = SVC(gamma=0.001).fit(digits.data[train], digits.target[train])
    classifier, score = fit_classifier()
    images = held_out[0].reshape(-1, 64)
    np.testing.assert_array_equal(classifier.predict(images), expected.predict(images))
    assert score == (expected.predict(images) == held_out[1]).mean()


def test_permuted_labels_score_as_chance(held_out, tmp_path):
    images, labels = held_out
    write_samples(tmp_path, images, np.random.default_rng(0).permutation(labels))
    assert digit_accuracy(tmp_path)["accuracy"] == pytest.approx(0.1, abs=0.05)


def test_wrong_labels_score_zero(held_out, tmp_path):
    images, labels = held_out
    write_samples(tmp_path, images, (labels + 1) % 10)
    assert digit_accuracy(tmp_path)["accuracy"] < 0.02


def test_accuracy_per_digit_is_the_recall_of_each_class(held_out, tmp_path):
    """Half of the digits mislabelled, so that the classes differ; digit 9 does not occur."""
    images, labels = held_out[0][:300], held_out[1][:300].copy()
    labels[:150] = np.where(labels[:150] < 3, 3, labels[:150])
    keep = labels != 9
    write_samples(tmp_path, images[keep], labels[keep])
    report = digit_accuracy(tmp_path)
    predicted = fit_classifier()[0].predict(images[keep].reshape(-1, 64))
    recalls = recall_score(labels[keep], predicted, labels=range(9), average=None)
    assert sorted(report["accuracy_per_digit"]) == list(range(9))
    np.testing.assert_allclose([report["accuracy_per_digit"][d] for d in range(9)], recalls)


def test_pixels_come_back_on_the_digits_scale(real, held_out):
    images, classes = read_samples(real)
    np.testing.assert_allclose(images.reshape(-1, 8, 8), held_out[0], atol=0.04)
    np.testing.assert_array_equal(classes, held_out[1])


class TestErrors:
    @pytest.fixture
    def folder(self, held_out, tmp_path):
        write_samples(tmp_path, held_out[0][:3], held_out[1][:3])
        return tmp_path

    def test_a_missing_folder_or_index(self, tmp_path):
        for folder in (tmp_path, tmp_path / "missing"):
            with pytest.raises(UserError, match=rf"{folder}/samples.jsonl not found; accepted"):
                digit_accuracy(folder)

    def test_a_missing_picture(self, folder):
        (folder / "000001.png").unlink()
        with pytest.raises(UserError, match=rf"{folder}/000001.png: not found"):
            digit_accuracy(folder)

    @pytest.mark.parametrize("keep", [0, 20, 60])
    def test_a_damaged_picture(self, folder, keep):
        path = folder / "000002.png"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{folder}/000002.png: cannot be read"):
            digit_accuracy(folder)

    @pytest.mark.parametrize(("size", "mode"), [((16, 16), "L"), ((8, 8), "RGB"), ((8, 9), "L")])
    def test_a_picture_of_another_kind(self, folder, size, mode):
        Image.new(mode, size).save(folder / "000000.png")
        with pytest.raises(UserError, match=rf"{folder}/000000.png: {size[0]}x{size[1]} {mode}; accepted: 8x8 grey"):
            digit_accuracy(folder)

    @pytest.mark.parametrize(
        "line",
        ["not json", "[1]", "3", "{}", '{"file": "000000.png"}', '{"class": 1}', '{"file": "000000.png", "class": "one"}',
         '{"file": 3, "class": 1}', '{"file": "000000.png", "class": null}', '{"file": "000000.png", "class": 10}',
         '{"file": "000000.png", "class": -1}', '{"file": "000000.png", "class": 1.5}'],
    )  # fmt: skip
    def test_a_line_that_is_no_sample_is_named_by_its_number(self, folder, line):
        index = folder / "samples.jsonl"
        index.write_text(index.read_text() + line + "\n")
        with pytest.raises(UserError, match=rf"{index}:4: "):
            digit_accuracy(folder)

    def test_no_samples(self, folder):
        (folder / "samples.jsonl").write_text("")
        with pytest.raises(UserError, match=rf"{folder}/samples.jsonl: holds no samples"):
            digit_accuracy(folder)

    def test_an_index_that_is_no_text(self, folder):
        (folder / "samples.jsonl").write_bytes(b"\xff\xfe\x00\n")
        with pytest.raises(UserError, match=rf"{folder}/samples.jsonl"):
            digit_accuracy(folder)


def test_command_line_writes_and_prints_the_report(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digit_accuracy.py", str(real), "--output", str(tmp_path / "report.json")])
    assert run() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_samples"] == 540
    assert f"recognised {report['accuracy']:.1%} of 540 samples" in capsys.readouterr().out
