"""tools/benchmark.py at the size of a laptop: every row says what it measured; figures are not judged here."""

import json
import math

import pytest

from tests.integration.launching import start_ranks

ROW = {"name", "value", "unit", "target", "floor", "machine", "versions", "shapes"}
MEASURED = {
    "sample": {"images_per_second", "step", "step_of_bare_layers", "step_over_bare_layers"},
    "train": {"samples_per_second", "flops_per_second", "loss_of_the_last_steps"},
    "attention": {"reference_64", "sdpa_64", "reference_256", "sdpa_256"},
    "data": {"samples_per_second_0_workers", "samples_per_second_1_workers", "samples_per_second_4_workers"},
}


@pytest.mark.parametrize(("what", "ranks"), [("sample", 1), ("train", 2), ("attention", 1), ("data", 1)])
@pytest.mark.usefixtures("command")
def test_a_benchmark_writes_its_rows(tmp_path, what, ranks):
    output = tmp_path / "bench.json"
    arguments = [what, "--size", "tiny", "--output", str(output), "--batch_size", "8", "--steps", "2"]
    finished = start_ranks("tools/benchmark.py", arguments, tmp_path / "log", ranks=ranks).wait()
    assert finished.code == 0, finished.output
    rows = json.loads(output.read_text())
    assert MEASURED[what] <= {row["name"].removeprefix(f"{what}/") for row in rows}
    for row in rows:
        assert row.keys() == ROW
        assert row["value"] > 0
        assert math.isfinite(row["value"])
        assert row["versions"]["torch"]
        assert row["name"] in finished.output


@pytest.mark.usefixtures("command")
def test_a_batch_of_none_is_refused(tmp_path):
    finished = start_ranks("tools/benchmark.py", ["data", "--batch_size", "-1"], tmp_path / "log").wait()
    assert finished.code == 2
    assert "error: batch_size: got -1; accepted: 1 or more" in finished.output
