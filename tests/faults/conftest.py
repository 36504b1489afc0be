"""The options of the long campaign (long_campaign.py)."""

import shlex
from pathlib import Path

from tests.integration.conftest import _environment  # noqa: F401  a fixture: what the forked ranks start in


def pytest_addoption(parser):
    group = parser.getgroup("faults", "the long fault campaign")
    group.addoption("--fault-runs", type=int, default=60, help="runs that are killed; default: 60")
    group.addoption("--fault-seed", type=int, default=0, help="of everything that is drawn; default: 0")
    group.addoption("--fault-report", type=Path, help="file that gets a JSON object a run; default: in --basetemp")
    group.addoption("--fault-training", type=shlex.split, default="", help="more training arguments, in one word")
