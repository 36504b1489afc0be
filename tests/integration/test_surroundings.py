"""What a run does to its machine: nothing is left in shared memory, and nobody on the network reaches its stores."""

from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from tests.integration.launching import listening, train

SHARED_MEMORY = Path("/dev/shm")


def processes_of(output_dir: Path) -> list[Path]:
    """Return the folders in /proc of the launchers and ranks of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(output_dir).encode() in (process / "cmdline").read_bytes():
                found.append(process)
    return found


def test_a_run_under_the_launcher_opens_no_port_to_others_and_no_shared_memory(command, tmp_path):
    output_dir, ports, shared = tmp_path / "run", set(), []
    before = set(SHARED_MEMORY.iterdir())

    def look() -> bool:
        if not (output_dir / "metrics.jsonl").is_file():
            return False
        for process in processes_of(output_dir):
            ports.update(listening(process))
            with suppress(OSError):
                mapped = (process / "maps").read_text().splitlines()
                shared.extend(line for line in mapped if "/dev/shm/" in line and not line.endswith(" (deleted)"))
        return True

    killed = train(*command.training(output_dir, {"sample__every": 0}), ranks=2, kill_when=look)
    assert killed.code == -9, killed.output
    assert len(ports) >= 2  # rendezvous and watchdog
    assert [address for address, _ in ports if not ip_address(address).is_loopback] == []
    assert shared == []
    left = [file.name for file in set(SHARED_MEMORY.iterdir()) - before]
    assert [name for name in left if any(f"_{port}_" in name for _, port in ports)] == []  # not of another program
