"""Progress bars: lines in a log, a bar redrawn in place in a terminal."""

import io
import os
import pty

import datasets
import diffusers
import pytest
import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from transformers import BertConfig, BertModel

from latte_flow.training.monitor import progress
from latte_flow.training.monitor.progress import LINE_SECONDS, hide_library_bars, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """The time that bars read, in a list: the test moves it on."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute(clock):
    log = io.StringIO()
    with progress_bar(total=600, desc="training", unit="step", stream=log, mininterval=0, miniters=1) as bar:
        for step in range(600):  # a step a second: ten minutes
            clock[0] = float(step)
            bar.update()
            bar.set_postfix(loss=f"{step}")
    text = log.getvalue()
    assert "\r" not in text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert len(lines) == 600 / LINE_SECONDS + 1  # the first line and the last are the start and the end
    assert all(line.startswith("training: ") for line in lines)
    assert lines[0].startswith("training:   0% 0/600 [")
    assert lines[-1].startswith("training: 100% 600/600 [")
    assert "loss=599" in lines[-1]


def test_what_is_printed_beside_a_bar_stands_on_lines_of_its_own(clock):
    log = io.StringIO()
    with progress_bar(total=3, desc="encoding", stream=log, mininterval=0, miniters=1) as bar:
        bar.update()
        log.write("warning: an image is broken\n")
        bar.update(2)
    start, warning, end = log.getvalue().splitlines()
    assert (start.split(" [")[0], end.split(" [")[0]) == ("encoding:   0% 0/3", "encoding: 100% 3/3")
    assert warning == "warning: an image is broken"


def test_a_disabled_bar_writes_nothing():
    log = io.StringIO()
    with progress_bar(total=3, desc="sampling", stream=log, disable=True) as bar:
        bar.update(3)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_that_is_redrawn_in_place():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        with progress_bar(total=2, desc="training", stream=terminal, mininterval=0, miniters=1) as bar:
            bar.update(2)
        text = os.read(master, 65536).decode()
    os.close(master)
    assert text.count("\r") > 1
    assert "training: 100%|" in text


@pytest.fixture
def library_bars(monkeypatch):
    """All libraries' bars on, before and after."""

    def turn_on():
        transformers.utils.logging.enable_progress_bar()
        enable_progress_bars()
        diffusers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()

    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS")
    turn_on()
    yield
    turn_on()


def test_the_libraries_bars_stay_out_of_a_log(library_bars, tmp_path, capfd):
    BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "model")
    table = datasets.Dataset.from_dict({"x": torch.arange(4).tolist()})

    def load() -> str:
        BertModel.from_pretrained(tmp_path / "model")
        table.map(lambda row: {"y": row["x"]}, load_from_cache_file=False)
        return capfd.readouterr().err

    before = load()
    assert "Loading weights" in before
    assert "Map" in before
    hide_library_bars()
    assert load() == ""
    assert not diffusers.utils.logging.is_progress_bar_enabled()


def test_a_terminal_keeps_the_libraries_bars(library_bars, monkeypatch):
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    hide_library_bars()
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert datasets.are_progress_bars_disabled() is False
    assert diffusers.utils.logging.is_progress_bar_enabled()
