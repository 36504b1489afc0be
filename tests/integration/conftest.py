"""Runs shared by the integration tests: each is started once a session, when the first test asks for it."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.launching import Finished, Ranks, server_environment, start_ranks

REDUCED = {
    "global_batch_size": 32,
    "max_steps": 8,
    "vlm.tiny.hidden_size": 32,
    "vlm.tiny.intermediate_size": 64,
    "optimizer.warmup_steps": 4,
    "logging.every": 1,
    "checkpoint.every": 4,
    "sample.every": 4,
    "sample.num_images": 20,
    "sample.num_steps": 8,
}
"""The digits preset, narrow and short: 8 layers in 4 groups of 2."""


@dataclass(frozen=True)
class Run:
    """A command line that has ended: the folder it wrote to, how it ended, and what the hooks saw."""

    output_dir: Path
    finished: Finished
    hook_dir: Path

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.output_dir / "checkpoints" / f"step_{step:07d}"


class CommandLines:
    """Runs the project's command lines, each with a folder of its own for what it leaves behind."""

    def __init__(self, folder: Path):
        self._folder, self._numbers = folder, itertools.count()

    def _new_folder(self) -> Path:
        folder = self._folder / f"{next(self._numbers):03d}"
        folder.mkdir()
        return folder

    def training(self, output_dir: Path, fields: dict, zero: str = "zero2") -> list[str]:
        """Return the arguments of training/main.py for the digits preset at the size of REDUCED."""
        values = {"deepspeed": f"ds_configs/{zero}.json", "output_dir": output_dir} | REDUCED
        values |= {name.replace("__", "."): value for name, value in fields.items()}
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    def train(
        self,
        *,
        ranks: int = 1,
        zero: str = "zero2",
        output_dir: Path | None = None,
        hooks: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
        code: int | None = 0,
        **fields,
    ) -> Run:
        """Train the digits preset at the size of REDUCED.

        Args:
            ranks: number of processes.
            zero: name of a file of ds_configs/.
            output_dir: None for a new one.
            hooks: of tests/integration/hooks.py.
            variables: environment variables, for the hooks.
            code: the expected exit code; None for any.
            fields: of the configuration, with two underscores in place of a dot.
        """
        folder = self._new_folder()
        output_dir = output_dir or folder / "run"
        command = self.training(output_dir, fields, zero)
        variables = {"HOOK_DIR": str(folder)} | (variables or {})
        started = start_ranks(
            "training/main.py", command, folder / "log", ranks=ranks, hooks=hooks, variables=variables
        )
        finished = started.wait()
        assert code in (None, finished.code), finished.output
        return Run(output_dir, finished, folder)

    def start(self, output_dir: Path, *, ranks: int = 1, **fields) -> Ranks:
        """Start training the digits preset at the size of REDUCED; the fields are those of ``train``."""
        log = self._new_folder() / "log"
        return start_ranks("training/main.py", self.training(output_dir, fields), log, ranks=ranks)

    def main(self, *arguments: str, ranks: int = 1) -> Finished:
        """Run training/main.py with a command line."""
        return start_ranks("training/main.py", arguments, self._new_folder() / "log", ranks=ranks).wait()

    def tool(self, script: str, *arguments: str) -> None:
        """Run a script of tools/, which must succeed."""
        finished = start_ranks(script, arguments, self._new_folder() / "log").wait()
        assert finished.code == 0, finished.output

    def sample(
        self,
        checkpoint: Path,
        *arguments: str,
        output: Path | None = None,
        ranks: int = 1,
        code: int | None = 0,
        hooks: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
    ) -> Run:
        """Run tools/sample.py with few steps; hooks and their variables as in ``train``."""
        folder = self._new_folder()
        output = output or folder / "drawn"
        command = [str(checkpoint), "--output", str(output), "--num_steps", "4", *arguments]
        options = {"ranks": ranks, "hooks": hooks, "variables": variables}
        finished = start_ranks("tools/sample.py", command, folder / "log", **options).wait()
        assert code in (None, finished.code), finished.output
        return Run(output, finished, folder)


@pytest.fixture(scope="session", autouse=True)
def _environment():
    with server_environment():
        yield


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> CommandLines:
    """The project's command lines."""
    return CommandLines(tmp_path_factory.mktemp("integration"))


@pytest.fixture(scope="session")
def one_rank(command) -> Run:
    """Eight steps on one rank, watched."""
    return command.train(hooks=("record_batches", "watch_vlm"))


@pytest.fixture(scope="session")
def two_ranks(command) -> Run:
    """The same eight steps on two ranks, watched."""
    return command.train(ranks=2, hooks=("record_batches",))
