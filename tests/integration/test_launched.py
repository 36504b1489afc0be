"""A run under the real ``deepspeed`` launcher: it trains what the forked ranks of the other tests train, and what it does to its
machine: nothing is left in shared memory, and nobody on the network reaches its stores."""

from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.integration.conftest import Run
from tests.integration.launching import listening, metrics, train
from tests.integration.test_training import STEPS, assert_weights_equal

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Seen:
    """What was seen of the processes of a run while it trained, and of /dev/shm after it."""

    ports: set[tuple[str, int]]
    mapped: list[str]
    left: list[str]


def processes_of(output_dir: Path) -> list[Path]:
    """Return the folders in /proc of the launchers and ranks of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(output_dir).encode() in (process / "cmdline").read_bytes():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def launched(command, tmp_path_factory) -> tuple[Run, Seen]:
    """The eight steps of the fixture ``two_ranks`` under the launcher."""
    folder = tmp_path_factory.mktemp("launched")
    output_dir, ports, mapped = folder / "run", set(), []
    before = set(SHARED_MEMORY.iterdir())

    def look() -> bool:
        if not ports and (output_dir / "metrics.jsonl").is_file():
            for process in processes_of(output_dir):
                ports.update(listening(process))
                maps = (process / "maps").read_text().splitlines()
                mapped.extend(line for line in maps if "/dev/shm/" in line and not line.endswith(" (deleted)"))
        return False

    finished = train(*command.training(output_dir, {}), ranks=2, kill_when=look)
    assert finished.code == 0, finished.output
    left = [file.name for file in set(SHARED_MEMORY.iterdir()) - before]
    return Run(output_dir, finished, folder), Seen(ports, mapped, left)


def test_it_trains_the_same_bits_as_the_forked_ranks_of_the_other_tests(launched, two_ranks):
    run, _ = launched
    volatile = {"samples_per_second", "rank_seconds_min", "rank_seconds_median", "rank_seconds_max", "slowest_rank"}
    ours, theirs = (
        [{k: v for k, v in entry.items() if k not in volatile} for entry in metrics(r.output_dir)]
        for r in (run, two_ranks)
    )
    assert ours == theirs
    assert_weights_equal(run, two_ranks, STEPS)


def test_it_opens_no_port_to_others_and_no_shared_memory(launched):
    """Shared memory that is not mapped while it trains is not left by a kill either."""
    _, seen = launched
    assert len(seen.ports) >= 2  # rendezvous and watchdog
    assert [address for address, _ in seen.ports if not ip_address(address).is_loopback] == []
    assert seen.mapped == []
    # Of the files left, those of this run, not of another program.
    assert [name for name in seen.left if any(f"_{port}_" in name for _, port in seen.ports)] == []
