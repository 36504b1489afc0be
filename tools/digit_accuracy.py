"""Score generated digits: how often a classifier of real digits recognises the digit that the prompt asked for.

    python tools/digit_accuracy.py SAMPLES_DIR [--output report.json]

SAMPLES_DIR is a folder written by tools/sample.py for the digits preset. The classifier, a support vector machine, is fitted on
the part of scikit-learn's digits that the preset trains on. Its accuracy on the held-out part is reported as well.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from latte_flow.model.files import reading
from latte_flow.tools.command_line import run_function
from latte_flow.training.data.sources.digits import digits_split
from latte_flow.training.errors import UserError, naming

IMAGE_SIZE = (8, 8)
# From scikit-learn's own example for these digits; 99 % on held-out ones.
GAMMA = 0.001


def fit_classifier() -> tuple[SVC, float]:
    """Return the classifier of real digits (pixel values 0 to 16) and its accuracy on held-out real digits."""
    digits = load_digits()
    train, held_out = digits_split()
    classifier = SVC(gamma=GAMMA).fit(digits.data[train], digits.target[train])
    return classifier, float(classifier.score(digits.data[held_out], digits.target[held_out]))


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [n, 64], scaled to the digits' range of 0 to 16, and their classes [n].

    Raises:
        UserError: when the folder, its index, an image or a class is missing or invalid.
    """
    index = folder / "samples.jsonl"
    if not index.is_file():
        raise UserError(f"{index} not found; accepted: a folder written by tools/sample.py")
    images, classes = [], []
    with naming(), reading(index, "not a text file"):
        lines = index.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        with naming(), reading(f"{index}:{number}", "not a JSON object with file and class 0 to 9"):
            entry = json.loads(line)
            if entry["class"] not in range(10):
                raise ValueError(f"class {entry['class']}")
            classes.append(int(entry["class"]))
            file = folder / entry["file"]
        with naming(), reading(file, "cannot be read as an image"):
            image = Image.open(file)
            image.load()
        if image.size != IMAGE_SIZE or image.mode != "L":
            raise UserError(f"{file}: {image.size[0]}x{image.size[1]} {image.mode}; accepted: 8x8 grey (L)")
        images.append(np.asarray(image, dtype=np.float64).ravel() / 255 * 16)
    if not images:
        raise UserError(f"{index}: holds no samples")
    return np.stack(images), np.array(classes)


def digit_accuracy(folder: Path) -> dict:
    """Return the fraction of samples whose class the classifier recognises, overall and per digit, and its own accuracy.

    Raises:
        UserError: see ``read_samples``.
    """
    images, classes = read_samples(folder)
    classifier, on_real = fit_classifier()
    correct = classifier.predict(images) == classes
    return {
        "accuracy": float(correct.mean()),
        "num_samples": len(classes),
        "accuracy_per_digit": {int(digit): float(correct[classes == digit].mean()) for digit in np.unique(classes)},
        "accuracy_on_held_out_real_digits": on_real,
    }


def score(samples: Path, *, output: Path | None = None) -> None:
    """Score generated digits.

    Args:
        samples: folder written by tools/sample.py
        output: file for the report, as JSON
    """
    report = digit_accuracy(samples)
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")
    per_digit = "  ".join(f"{digit}: {share:.0%}" for digit, share in report["accuracy_per_digit"].items())
    print(f"recognised {report['accuracy']:.1%} of {report['num_samples']} samples  ({per_digit})")
    print(f"the same classifier on held-out real digits: {report['accuracy_on_held_out_real_digits']:.1%}")


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return run_function(score)


if __name__ == "__main__":
    sys.exit(run())
