"""A wheel of the checkout, in an environment of its own: it holds all that training and drawing need, and nothing else."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import REDUCED
from tests.integration.launching import ROOT, Finished, environment, free_port, metrics, run

ROOMS = ("model", "training", "tools")
COMMANDS = ("train", "sample", "encode-latents", "convert", "benchmark")


@dataclass(frozen=True)
class Installed:
    """An environment that a wheel was installed into."""

    folder: Path
    outside: Path

    @property
    def package(self) -> Path:
        """The folder of the installed package."""
        (found,) = self.folder.glob("lib/python*/site-packages/latte_flow")
        return found

    def run(self, program: str, *arguments: str) -> Finished:
        """Run a program of the environment in a folder that has nothing to do with the checkout."""
        env = environment()
        del env["PYTHONPATH"]
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        return run([str(self.folder / "bin" / program), *arguments], cwd=self.outside, env=env)

    def evaluate(self, code: str) -> Finished:
        """Run a line of Python in the environment."""
        return self.run("python", "-c", code)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel from a copy: setuptools would leave a build folder in the checkout, and take over what an older one holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("latte_flow", "ds_configs", *ROOMS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """Install the wheel into an empty environment, which borrows the packages that it depends on from this one.

    A folder that a .pth file names is searched, but its own .pth files are not read: an editable installation of the checkout
    in this environment stays out of the other.
    """
    folder, outside = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    pip(sys.executable, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    # Only now: pip would take the other environment's installation of the same version for one in this.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder, outside)


def pip(python: str, *arguments) -> None:
    """Run pip; its output is shown when it fails."""
    env = environment()
    del env["PYTHONPATH"]  # the egg-info of an editable checkout would pass for an installation
    finished = run([python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)], env=env)
    assert finished.code == 0, finished.output


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = [path.relative_to(ROOT) for room in (*ROOMS, "ds_configs") for path in (ROOT / room).rglob("*.*")]
    expected = {f"latte_flow/{file}" for file in files if file.suffix in (".py", ".yaml", ".json", ".txt")}
    expected.add("latte_flow/__init__.py")
    assert {"latte_flow/ds_configs/zero2.json", "latte_flow/training/configs/digits.yaml"} < expected
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert all(name.startswith(("latte_flow/", "latte_flow-")) for name in names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_no_package_of_its_own(installed, room):
    finished = installed.evaluate(f"import {room}")
    assert finished.code == 1
    assert f"No module named '{room}'" in finished.output


def test_the_version_is_that_of_the_installed_package(installed):
    code = "import importlib.metadata, latte_flow; print(importlib.metadata.version('latte-flow'))"
    finished = installed.evaluate(f"{code}; print(latte_flow.__version__); print(latte_flow.__file__)")
    assert finished.code == 0, finished.output
    of_metadata, of_package, file = finished.output.splitlines()
    assert of_metadata == of_package
    assert Path(file) == installed.package / "__init__.py"


def test_the_console_scripts_are_there(installed):
    scripts = {path.name for path in (installed.folder / "bin").glob("latte-flow-*")}
    assert scripts == {f"latte-flow-{command}" for command in COMMANDS}


def train(installed: Installed, program: str, *arguments: str, output_dir: Path) -> None:
    """Train two steps on the preset and the DeepSpeed configuration of the package."""
    values = REDUCED | {"max_steps": 2, "optimizer.warmup_steps": 1, "checkpoint.every": 2, "sample.every": 2}
    values |= {"deepspeed": "ds_configs/zero2.json", "config": "digits", "output_dir": output_dir}
    finished = installed.run(program, *arguments, *(f"--{name}={value}" for name, value in values.items()))
    assert finished.code == 0, finished.output
    assert [entry["step"] for entry in metrics(output_dir)] == [1, 2]


def test_the_installed_commands_train_and_draw(installed, tmp_path):
    """One process without a launcher, then images from its checkpoint."""
    output, drawn = tmp_path / "run", tmp_path / "drawn"
    train(installed, "latte-flow-train", output_dir=output)
    arguments = [str(output), "--output", str(drawn), "--num_images", "2", "--num_steps", "4"]
    finished = installed.run("latte-flow-sample", *arguments)
    assert finished.code == 0, finished.output
    assert {path.name for path in drawn.iterdir()} == {"000000.png", "000001.png", "samples.jsonl", "grid.png"}


def test_the_launcher_starts_the_installed_module_on_two_ranks(installed, tmp_path):
    """As docs/quickstart.md describes. The ``deepspeed`` script on PATH would start the Python of its own environment."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"]
    train(installed, "python", *launcher, "--module", "latte_flow.training.main", output_dir=tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("step_*/manifest.json")
    assert json.loads(manifest.read_text())["world_size"] == 2
