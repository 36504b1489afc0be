"""The long campaign, under the real ``deepspeed`` launcher; its name keeps it out of a run of all tests.

    pytest tests/faults/long_campaign.py [--fault-runs 60] [--fault-seed 0] [--fault-report FILE] [--basetemp DIR]

``-k kill`` kills one rank, all ranks or the launcher with SIGKILL at random moments: while starting, in a step, in every part of
a save, while drawing the grid, while resuming; after some kills a file of the newest checkpoint is damaged, too. ``-k signal``
sends each signal, and writes the stop file, in each moment of a run. After each the same command continues, and the run must end
with the weights, losses and sample grids of one that nothing disturbed. What is drawn depends on the seed and the run's number
alone: ``long_campaign.py::test_kill[17]`` repeats one run.
"""

from contextlib import closing
from functools import partial

import pytest

from tests.faults.campaign import Campaign, training_arguments
from tests.faults.launches import choose_port, start_deepspeed
from tests.faults.plan import SIGNAL_CHAINS, kill_cases, signal_cases


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, pytestconfig):
    port = choose_port()
    arguments = [*training_arguments(), *pytestconfig.getoption("fault_training")]
    output, report = tmp_path_factory.mktemp("faults"), pytestconfig.getoption("fault_report")
    with closing(
        Campaign(start=partial(start_deepspeed, port), arguments=arguments, output=output, report=report)
    ) as campaign:
        yield campaign


def pytest_generate_tests(metafunc):
    if "killed" in metafunc.fixturenames:
        metafunc.parametrize("killed", range(metafunc.config.getoption("fault_runs")))


def test_kill(campaign, pytestconfig, killed):
    seed = pytestconfig.getoption("fault_seed")
    assert campaign.run(kill_cases(campaign.schedule, seed=seed, runs=killed + 1)[killed]).problems == []


@pytest.mark.parametrize("number", range(len(SIGNAL_CHAINS)))
def test_signal(campaign, number):
    assert campaign.run(signal_cases(campaign.schedule)[number]).problems == []
