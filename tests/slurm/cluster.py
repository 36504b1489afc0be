"""A real SLURM on this machine: munged, slurmctld and two slurmd that stand for two nodes of 8 GPUs, all in a temporary folder.

Nothing of the system's own SLURM is touched: own ports, own key, own state, found through SLURM_CONF.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
INSTALL = "apt-get install -y slurm-wlm munge"
INSTALL_SECONDS = 300
REQUEUE_DELAY = 5  # seconds that SLURM holds a requeued job back; its default is 120, its minimum 5

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
# The nodes claim more than this machine has, so that the scripts' requests (8 GPUs a node) are granted as they stand.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why these tests cannot run, None when they can.

    LATTE_FLOW_INSTALL_SLURM=1 (continuous integration) installs SLURM where it is missing, which changes the machine and so is
    never done unasked.

    Raises:
        RuntimeError: when the installation failed.
    """
    if os.geteuid() != 0:
        return "SLURM's daemons, which these tests start, need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if not absent:
        return None
    if os.environ.get("LATTE_FLOW_INSTALL_SLURM") != "1":
        return f"{', '.join(absent)} not found (Debian: {INSTALL}; LATTE_FLOW_INSTALL_SLURM=1 does it)"
    # RUNLEVEL=1 keeps the packages from starting daemons of their own.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    command = f"apt-get update -qq && {INSTALL} -qq --no-install-recommends"
    with tempfile.TemporaryFile("w+") as log:  # a pipe would stay open in whatever the packages start
        try:
            subprocess.run(["bash", "-c", command], env=environment, stdout=log, stderr=log, timeout=INSTALL_SECONDS)
            said = ""
        except subprocess.TimeoutExpired:
            said = f"more than {INSTALL_SECONDS} s; "
        log.seek(0)
        said += log.read().strip()[-500:]
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if not absent:
        return None
    raise RuntimeError(f"{', '.join(absent)} not found, and installation failed ({command}): {said}")


class Cluster:
    """Two nodes, n1 and n2. Use it as a context manager.

    Args:
        folder: for its state and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        config = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            ports=_free_ports(3),
            requeue_delay=REQUEUE_DELAY,
        )
        (self.folder / "slurm.conf").write_text(config)
        # SLURM counts GPUs by their device files, and any file will do.
        for i in range(8):
            (self.folder / f"gpu{i}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.folder / file}" for name, file in munge.items()]
        try:
            # --force: it would refuse a temporary folder for its permissions.
            self._start("munged", "--foreground", "--force", *options, f"--seed-file={self.folder / 'munged.seed'}")
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self._wait(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).split() == ["idle"], "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.daemons:
            self.run("scancel", "--user=root", check=False)
        # The jobs' processes end with slurmd's help, so slurmd goes after them, and munged, which all use, last.
        deadline = time.monotonic() + 40
        while len(self.daemons) > 1 and self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = []

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a SLURM command on this cluster and return what it prints."""
        result = subprocess.run(
            command, env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, job: str, timeout: float) -> str:
        """Wait until a job is over and return its last state.

        Raises:
            TimeoutError: when it is not over after ``timeout`` seconds.
        """
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait(lambda: self.job(job)["JobState"] in over, f"the end of job {job}", timeout)
        return self.job(job)["JobState"]

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            )

    def _wait(self, condition, what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                tails = "\n".join(
                    f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log"))
                )
                raise TimeoutError(f"no {what} after {timeout} s\n{tails}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
