"""A SLURM cluster for each file of this folder, one at a time, and jobs on it that use this Python."""

import fcntl
import sys
from pathlib import Path

import pytest

from tests.integration.launching import ROOT
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes; skips with the reason where SLURM cannot be had."""
    with (tmp_path_factory.getbasetemp().parent / "slurm.lock").open("w") as lock:
        # launch/run_tests.sh runs two files at a time; they would install it at once, too.
        fcntl.flock(lock, fcntl.LOCK_EX)
        reason = missing()
        if reason:
            pytest.skip(reason)
        with Cluster(tmp_path_factory.mktemp("slurm")) as running:
            yield running


@pytest.fixture
def submit(cluster, tmp_path):
    """Return a function that submits a launch script over two nodes: (script, arguments) -> job number.

    The job's log is ``tmp_path/job.log``, the nodes' logs are below ``tmp_path/logs``.
    """

    def submit_script(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
        output = cluster.run(
            *("sbatch", "--parsable", "--nodes=2", f"--output={tmp_path / 'job.log'}", str(ROOT / "launch" / script)),
            *arguments,
            cwd=cwd,
            LATTE_FLOW_PYTHON=sys.executable,
            DS_ACCELERATOR="cpu",  # the nodes claim GPUs, see cluster.py
            LATTE_FLOW_LOGS=str(tmp_path / "logs"),
            OMP_NUM_THREADS="1",
            **environment,
        )
        return output.split(";")[0]

    return submit_script
