"""Tiny runs train what they trained when record.py recorded them: the same samples, and the same numbers to rounding."""

import pytest

from tests.golden.record import FOLDER, beyond, differences, read, tolerance
from tests.golden.runs import RUNS, record
from tests.integration.conftest import CommandLines
from tests.integration.launching import server_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with server_environment():
        yield CommandLines(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_what_was_recorded(command, tmp_path, name):
    recorded = read(FOLDER, name)
    found = differences(record(command, name, tmp_path), recorded)
    lines = beyond(found, tolerance(recorded["run"]))
    assert not lines, "\n".join(lines)
