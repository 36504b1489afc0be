"""Logs that cannot be written: skipped, counted, reported once, and whole again as soon as writing works."""

import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latte_flow.training.monitor import logs
from latte_flow.training.monitor.logs import LogFile, failed_logs, skip_failures
from latte_flow.training.monitor.metrics import MetricsWriter
from tests.integration.launching import environment


@pytest.fixture(autouse=True)
def _count_from_zero(monkeypatch, capsys):  # capsys: the reports stay in memory, outside of file_limit
    monkeypatch.setattr(logs, "_failed", logs.Counter())


@contextmanager
def file_limit(size: int):
    """Let the writes of this process beyond a file's first bytes fail, after a part of them as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestLogFile:
    def test_part_of_a_record_is_removed_before_the_next(self, tmp_path):
        file = LogFile(tmp_path / "log")
        file.append(b"first\n")
        for _ in range(2):
            with file_limit(9), pytest.raises(OSError, match="File too large"):
                file.append(b"second\n")
            assert file.path.read_bytes() == b"first\nsec"
        file.append(b"third\n")
        assert file.path.read_bytes() == b"first\nthird\n"

    def test_a_file_that_was_emptied_meanwhile_gets_no_hole(self, tmp_path):
        file = LogFile(tmp_path / "log")
        file.append(b"first\n")
        with file_limit(9), pytest.raises(OSError, match="File too large"):
            file.append(b"second\n")
        file.path.write_bytes(b"1\n")
        file.append(b"third\n")
        assert file.path.read_bytes() == b"1\nthird\n"


def test_only_errors_of_the_operating_system_are_skipped():
    with pytest.raises(ValueError, match="a mistake"), skip_failures("a log"):
        raise ValueError("a mistake")
    assert failed_logs() == 0


def test_metrics_that_cannot_be_written_are_counted_and_the_file_stays_whole(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"loss": 1.0, "failed_logs": failed_logs()})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with file_limit(size + 5):
        for step in (2, 3):
            writer.scalars(step, {"loss": 1.0, "failed_logs": failed_logs()})
    writer.scalars(4, {"loss": 1.0, "failed_logs": failed_logs()})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["failed_logs"]) for entry in entries] == [(1, 0), (4, 4)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 4]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.match(r"metrics.jsonl could not be written: .*File too large; .* counted \(failed_logs in", said[0])
    assert said[1].startswith("TensorBoard could not be written")


def test_lines_to_drop_that_could_not_be_dropped_are_dropped_before_the_next_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.scalars(step, {"run": 1})
    with file_limit(10):
        resumed = MetricsWriter(tmp_path, 3)
        resumed.scalars(4, {"run": 2})
    resumed.scalars(5, {"run": 2})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["run"]) for entry in entries] == [(1, 1), (2, 1), (3, 1), (5, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_grid_that_cannot_be_written_leaves_no_part_of_it(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, 0)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    with file_limit(100):
        writer.grid(4, pixels)
    writer.grid(8, pixels)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000008.png"]
    assert failed_logs() == 2  # TensorBoard's too
    assert "a sample grid could not be written" in capsys.readouterr().err


PROGRAM = """
import logging, sys
handler = logging.StreamHandler(sys.stdout)
logging.getLogger("library").addHandler(handler)
from latte_flow.training.monitor.logs import failed_logs, protect_output
protect_output()
for _ in range(3):
    print("x" * 5000)
    print("a line", flush=True)
    print("progress", file=sys.stderr, flush=True)
    logging.getLogger("library").error("a library's line")
open(sys.argv[1], "w").write(str(failed_logs()))
"""


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("broken", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("how", ["full", "pipe"])
def test_output_that_cannot_be_written_ends_no_process(tmp_path, how, broken, buffered):
    if how == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    streams = {name: descriptor for name in ("stdout", "stderr") if broken in (name, "both")}
    environ = environment() | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "count"]
    finished = subprocess.run(
        command, env=environ, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams, text=True
    )
    os.close(descriptor)
    assert finished.returncode == 0, finished.stderr
    assert int((tmp_path / "count").read_text()) >= 3
    if broken == "stdout":
        assert len(re.findall("standard output could not be written", finished.stderr)) == 1
        assert "Traceback" not in finished.stderr
        assert finished.stderr.count("progress") == 3
    if broken == "stderr":
        assert finished.stdout.count("a line") == 3
