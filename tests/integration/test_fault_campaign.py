"""Nothing is ever lost: a reduced campaign of kills, and a reduced table of signals, by the tool's own code (tools/faults)."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess

import pytest

from latte_flow.tools.fault_campaign import training_arguments
from latte_flow.tools.faults.campaign import Campaign
from latte_flow.tools.faults.inspection import step_of
from latte_flow.tools.faults.moments import DATA, GRID, HALF_SHARD, STEP
from latte_flow.tools.faults.plan import STOP_FILE, TERM, USR1, USR1_TWICE, Schedule, kill_cases, signal_cases
from latte_flow.training.configs.parser import parse_config
from tests.integration.conftest import REDUCED
from tests.integration.launching import SERVER, _become, environment, free_port

RANKS = 2
SEED = 1008
"""Its eight kills lie in eight moments, five of them of a save, hit every victim, and damage a newest checkpoint."""
FIRST_SIGNAL_RUN = 100


@dataclass
class ForkedLaunch:
    """A launcher like DeepSpeed's, forked: it and its ranks have imported everything already."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def start_forked(script, arguments, log, variables) -> ForkedLaunch:
    """Start a launcher and RANKS ranks under it; a tools.faults.launches.Starter."""
    log.write_text("")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    process = SERVER.Process(
        target=_launch, args=(script, list(arguments), str(log), {**environment(), **shared, **variables})
    )
    process.start()
    return ForkedLaunch(process)


def _launch(script: str, arguments: list[str], log: str, variables: dict[str, str]) -> None:
    """Do what deepspeed/launcher/launch.py does: start the ranks; when one fails end all, by SIGTERM, then by SIGKILL."""
    os.setsid()
    fork = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(RANKS):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(fork.Process(target=_become, args=(script, arguments, own, log, [])))
        ranks[-1].start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.02)
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    for rank in ranks:
        rank.terminate()
    end = time.monotonic() + 30
    for rank in ranks:
        rank.join(max(end - time.monotonic(), 0))
        rank.kill()
    os._exit(code % 256)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    sizes = {
        name: REDUCED[name] for name in ("global_batch_size", "vlm.tiny.hidden_size", "vlm.tiny.intermediate_size")
    }
    arguments = training_arguments([text for name, value in sizes.items() for text in (f"--{name}", str(value))])
    return Campaign(
        start=start_forked,
        arguments=arguments,
        schedule=Schedule.of(parse_config(arguments)),
        ranks=RANKS,
        output=tmp_path_factory.mktemp("campaign"),
    )


def test_a_reduced_campaign_of_kills_loses_nothing(campaign):
    """Eight kills in two runs; in all of them a start goes on from the newest valid checkpoint, and the ends are equal."""
    results = [
        campaign.run(case) for case in kill_cases(campaign.schedule, seed=SEED, runs=2, kills_per_run=4, ranks=RANKS)
    ]
    assert [problem for result in results for problem in result.problems] == []
    starts = [start for result in results for start in result.starts]
    assert sum(start.fault is not None for start in starts) >= 8
    # The campaign would show nothing if no kill had left anything torn.
    assert any("partial" in start.after.values() for start in starts)
    assert any(start.damaged for start in starts)
    assert all(result.equal == {"weights": True, "metrics": True, "grids": True} for result in results)


def test_signals_and_the_stop_file_lead_to_a_checkpoint_and_a_requeue(campaign):
    """In a save, a step, a grid and a wait for data, with and without data workers; a second signal ends the run at once."""
    chain = [(TERM, HALF_SHARD), (USR1_TWICE, STEP), (STOP_FILE, GRID), (USR1, DATA)]
    (case,) = signal_cases(campaign.schedule, ranks=RANKS, chains=[chain])
    result = campaign.run(replace(case, number=FIRST_SIGNAL_RUN))
    assert result.problems == []
    assert [start.stopped_at for start in result.starts] == [4, 4, 9, 11, 12]
    assert [start.exit_code for start in result.starts] == [75, 128 + signal.SIGUSR1, 75, 75, 0]
    assert [start.requeue for start in result.starts] == [True, False, True, True, False]
    assert [start.resumed_from and step_of(start.resumed_from) for start in result.starts] == [None, 4, 4, 9, 11]
