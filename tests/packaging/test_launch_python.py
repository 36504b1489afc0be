"""LATTE_FLOW_PYTHON: the launch scripts use an interpreter as it is, and the checkout that they lie in."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.integration.launching import ROOT, Finished, environment, run


def train_local(checkout: Path, python: Path | str, *arguments: str) -> Finished:
    """Run a checkout's launch/train_local.sh with an interpreter, from a folder that is not the checkout."""
    env = environment() | {"LATTE_FLOW_PYTHON": str(python)}
    del env["PYTHONPATH"]
    return run(["bash", str(checkout / "launch" / "train_local.sh"), *arguments], cwd=checkout.parent, env=env)


def test_the_checkout_comes_before_an_installed_package(tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("latte_flow", "model", "training", "tools", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with (checkout / "latte_flow" / "__init__.py").open("a") as file:
        file.write("print('imported:', __file__)\n")
    finished = train_local(checkout, sys.executable, "--help")
    assert finished.code == 0, finished.output
    assert f"imported: {checkout / 'latte_flow' / '__init__.py'}" in finished.output
    assert "--optimizer.lr" in finished.output


def test_a_python_without_the_packages_is_refused_in_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    finished = train_local(ROOT, python)
    assert finished.code == 2
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: LATTE_FLOW_PYTHON: {python} lacks the packages of setup.cfg")
    assert "No module named 'deepspeed'" in line
