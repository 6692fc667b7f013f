"""deploy/slurm/train.sbatch on a real Slurm of one node: signal, save, requeue, resume, completion."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.faults.namespaces import problem
from tests.end_to_end.fleet import ROOT, environment, wait_until, write_config, write_demonstrations

START_S = 1200.0
_PATH = f"{os.environ['PATH']}:/usr/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
_MISSING = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(4 * START_S),
    pytest.mark.skipif(
        bool(_MISSING) or os.geteuid() != 0 or problem() is not None,
        reason=f"NOT TESTED: Slurm; {_MISSING or problem() or 'it needs root'} (apt-get install slurm-wlm munge, as root)",
    ),
]

ADDRESS = "10.84.0.2"
SETTINGS = """
ClusterName=stoker
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Controller and node daemon in a network namespace that leads nowhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.namespace = folder, f"stoker-{os.getpid()}-slurm"
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.host = socket.gethostname().partition(".")[0]

    @property
    def environment(self) -> dict[str, str]:
        return environment(SLURM_CONF=f"{self.folder}/slurm.conf", PATH=_PATH, DS_ACCELERATOR="cpu")

    def inside(self, *command: str) -> list[str]:
        # `ip netns exec` would mount another /sys, without the control groups that slurmd looks for.
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def run(self, *command: str) -> str:
        """A client program's output."""
        result = subprocess.run(
            self.inside(*command),
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        text = SETTINGS.format(host=self.host, folder=self.folder, cores=os.cpu_count())
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)
        for words in (
            "link set lo up",
            "link add eth0 type veth peer name eth1",
            f"address add {ADDRESS}/24 dev eth0",  # with a loopback alone Slurm finds no address to listen on
            "link set eth0 up",
            "link set eth1 up",
        ):
            subprocess.run(["ip", "-n", self.namespace, *words.split()], check=True)
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
        wait_until(lambda: (self.folder / "munge.socket").exists(), 60, "munged's socket")
        self._daemon("slurmctld", "-D", "-i")
        self._daemon("slurmd", "-D", "-N", self.host)
        wait_until(self._is_idle, 120, "an idle node")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as log:
            self.daemons.append(subprocess.Popen(self.inside(*command), env=self.environment, stdout=log, stderr=log))

    def _is_idle(self) -> bool:
        assert all(daemon.poll() is None for daemon in self.daemons), self._logs()
        command = self.inside("sinfo", "--noheader", "--format=%T")
        found = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return found.stdout.strip() == "idle"

    def _logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.out")))

    def state(self, job: str) -> str:
        """As `RUNNING`."""
        match = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(30)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, capture_output=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = (
        Path("/tmp") / f"stoker-slurm-{os.getpid()}"
    )  # sockets need short names, munged a folder that no group may write
    folder.mkdir(mode=0o755)
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, one loader, 24 steps; checkpoints only when asked."""
    folder = tmp_path_factory.mktemp("slurm")
    model = folder / "llava"
    command = [sys.executable, "-m", "trainer.models.tiny", "--family", "llava", "--out", str(model)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    path = write_config(folder, model, [write_demonstrations(folder / "demos", [8] * 24)])
    tree = yaml.safe_load(path.read_text())
    tree["model"]["precision"] = "fp32"
    tree["cluster"] = {"component_placement": {"trainer": 0, "dataloader": 0}}
    tree["trainer"] |= {"checkpoint": {"interval": 1000}, "export": False, "logger": {"tensorboard": False}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_time_limit_s_signal_saves_requeues_and_resumes(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "job.log"
    digests = output / "digests-rank0.jsonl"
    job = slurm.run(
        *("sbatch", "--parsable", f"--output={log}", f"--export=ALL,STOKER_LAUNCH={sys.executable} deploy/launch.py"),
        *("deploy/slurm/train.sbatch", "--config", str(config), "--set", f"trainer.output_dir={output}"),
    )
    try:
        said = lambda: log.read_text() if log.exists() else ""  # noqa: E731
        wait_until(lambda: digests.exists() and digests.read_text().count("\n") >= 5, START_S, f"5 steps: {said()}")
        slurm.run("scancel", "--signal=USR1", job)  # to the steps of the job, as --signal=USR1@300 does
        wait_until(lambda: "is queued again and resumes" in said(), START_S, f"the requeue: {said()[-3000:]}")
        wait_until(lambda: "start number 2" in said(), START_S, "the second start")
        wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), START_S, "the job's end")
    finally:
        slurm_state = slurm.state(job)
        if slurm_state not in ("COMPLETED", "FAILED"):
            slurm.run("scancel", job)
            time.sleep(1)
    assert slurm_state == "COMPLETED", said()[-4000:]
    assert "SIGUSR1: passed on to the ranks; the run saves a checkpoint and ends with exit code 75" in said()
    assert "resumed from" in said()
    steps = [int(re.search(r'"step": (\d+)', line)[1]) for line in digests.read_text().splitlines()]  # type: ignore[index]
    assert steps == list(range(1, 25)), "saved where it stood: no step was trained twice"
