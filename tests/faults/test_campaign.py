"""Nothing is ever lost: a short campaign of kills and signals, on forked ranks of a narrow network."""

import signal
from contextlib import closing

import pytest

from tests.faults.campaign import Campaign, training_arguments
from tests.faults.inspection import step_of
from tests.faults.launches import start_forked
from tests.faults.moments import DATA, GRID, HALF_SHARD, STEP
from tests.faults.plan import INT, STOP_FILE, TERM_TWICE, USR1, kill_cases, signal_cases
from tests.integration.conftest import REDUCED

SEED, RUNS = 1869, 2
"""Its eight kills lie in eight moments, five of them of a save, hit every victim, and damage a newest checkpoint."""
EQUAL = {"weights": True, "metrics": True, "grids": True}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, pytestconfig):
    names = ("global_batch_size", "vlm.tiny.hidden_size", "vlm.tiny.intermediate_size")
    arguments = training_arguments({name: REDUCED[name] for name in names})
    output, report = tmp_path_factory.mktemp("faults"), pytestconfig.getoption("fault_report", None)
    with closing(Campaign(start=start_forked, arguments=arguments, output=output, report=report)) as campaign:
        yield campaign


def kills(campaign):
    return kill_cases(campaign.schedule, seed=SEED, runs=RUNS, kills_per_run=4)


@pytest.mark.parametrize("run", range(RUNS))
def test_a_run_that_is_killed_four_times_loses_nothing(campaign, run):
    """Each start resumes from the newest valid checkpoint, and the ends are equal."""
    result = campaign.run(kills(campaign)[run])
    assert result.problems == []
    assert sum(start.fault is not None for start in result.starts) >= 4
    assert result.equal == EQUAL


def test_the_kills_left_torn_and_damaged_checkpoints(campaign):
    """The campaign would show nothing otherwise."""
    starts = [start for case in kills(campaign) for start in campaign.run(case).starts]
    assert any("partial" in start.after.values() for start in starts)
    assert any(start.damaged for start in starts)


def test_signals_and_the_stop_file_lead_to_a_checkpoint_and_a_requeue(campaign):
    """In a save, a step, a grid and a wait for data, with and without data workers; a second signal ends the run at once."""
    chain = [(INT, HALF_SHARD), (TERM_TWICE, STEP), (STOP_FILE, GRID), (USR1, DATA)]
    (case,) = signal_cases(campaign.schedule, [chain])
    result = campaign.run(case)
    assert result.problems == []
    assert result.equal == EQUAL
    assert [start.stopped_at for start in result.starts] == [4, 4, 9, 11, 12]
    assert [start.exit_code for start in result.starts] == [75, 128 + signal.SIGTERM, 75, 75, 0]
    assert [start.requeue for start in result.starts] == [True, False, True, True, False]
    assert [start.resumed_from and step_of(start.resumed_from) for start in result.starts] == [None, 4, 4, 9, 11]
