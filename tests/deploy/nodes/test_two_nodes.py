"""A run on two nodes without a cluster manager: two network namespaces, each with its address, a rank and a loader; keys on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from stoker_proto.run_record import ROW_BYTES
from tests.deploy.images.network import Network, internal_network
from tests.end_to_end.faults.namespaces import problem
from tests.end_to_end.fleet import ROOT, environment, run_cli, wait_until, write_config, write_demonstrations

START_S = 1200.0
NODES = ("first", "second")
LAUNCH = str(ROOT / "deploy" / "launch.py")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(6 * START_S),
    pytest.mark.skipif(problem() is not None, reason=f"NOT TESTED: several nodes without Ray; {problem()}"),
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with internal_network(NODES, tmp_path_factory.mktemp("network")) as network:
        yield network


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Robot demonstrations for 40 steps, a checkpoint every 10; on each node a rank and a loader."""
    folder = tmp_path_factory.mktemp("nodes")
    model, keys = folder / "llava", folder / "keys"
    command = [sys.executable, "-m", "trainer.models.tiny", "--family", "llava", "--out", str(model)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    for name in ("loader", "rank"):
        assert run_cli("keys", "--out", str(keys), "--name", name).returncode == 0
    path = write_config(folder, model, [write_demonstrations(folder / "demos", [8] * 40)])
    tree = yaml.safe_load(path.read_text())
    tree["model"]["precision"] = "fp32"
    tree["cluster"] = {
        "num_nodes": 2,
        "component_placement": {"trainer": "0-1", "dataloader": "0-1"},
        "security": {
            "loader_secret": f"{keys}/loader.key_secret",
            "allowed_ranks": [f"{keys}/rank.key"],
            "loader_key": f"{keys}/loader.key",
            "rank_secret": f"{keys}/rank.key_secret",
        },
    }
    tree["trainer"] |= {"checkpoint": {"interval": 10}, "export": False, "logger": {"tensorboard": False}}
    path.write_text(yaml.safe_dump(tree))
    assert run_cli("prepare", "--config", str(path)).returncode == 0
    return path


class Launcher:
    """One `launch.py` in a node's namespace, and what it says."""

    def __init__(
        self,
        network: Network,
        node: str,
        command: Sequence[str],
        log: Path,
        program: Sequence[str] = (LAUNCH,),
    ) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [*network.prefix(node), sys.executable, *program, *command],
                cwd=ROOT,
                env=environment(DS_ACCELERATOR="cpu"),
                stdout=file,
                stderr=file,
            )

    def said(self) -> str:
        return self.log.read_text()

    def errors(self) -> list[str]:
        """Its own error lines; one may stand behind a progress bar."""
        return re.findall(r"\[launch\] error: .*", self.said())

    def end(self, within_s: float = START_S) -> int:
        return self.process.wait(within_s)


def arguments(config: Path, output: Path, *overrides: str) -> list[str]:
    sets = [f"trainer.output_dir={output}", *overrides]
    return ["--config", str(config), *(part for one in sets for part in ("--set", one))]


@contextlib.contextmanager
def two_nodes(network: Network, command: Sequence[str], logs: Path, *more: str) -> Iterator[list[Launcher]]:
    """The same command on both nodes, with `more`; nothing of it is left afterwards."""
    place = ["--master-addr", network.addresses["first"], *more]
    with started(
        Launcher(network, node, [*command, "--node-rank", str(number), *place], logs / f"log{number}")
        for number, node in enumerate(NODES)
    ) as launchers:
        yield launchers
    nothing_left(command)


@contextlib.contextmanager
def two_torchruns(network: Network, command: Sequence[str], logs: Path) -> Iterator[list[Launcher]]:
    """The same, with the place of each node in torchrun's variables."""
    static = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    static += ("--master-addr", network.addresses["first"], "--master-port", "29500", "--node-rank")
    with started(
        Launcher(network, node, command, logs / f"log{number}", (*static, str(number), LAUNCH))
        for number, node in enumerate(NODES)
    ) as launchers:
        yield launchers
    nothing_left(command)


@contextlib.contextmanager
def started(launchers: Iterable[Launcher]) -> Iterator[list[Launcher]]:
    running: list[Launcher] = []
    try:
        running.extend(launchers)
        yield running
    finally:
        for launcher in running:
            launcher.process.terminate()
            launcher.end()


def nothing_left(command: Sequence[str]) -> None:
    """No process of the run lives."""
    output = next(one for one in command if one.startswith("trainer.output_dir="))
    wait_until(lambda: not processes_with(output), 60, f"the end of {processes_with(output)}")


def processes_with(words: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if words in line and process.pid != os.getpid():
            found.append(line)
    return found


def lines(output: Path, rank: int) -> dict[int, dict[str, Any]]:
    """Step -> its line in the rank's log; of a step that was trained twice, the last time."""
    path = output / f"digests-rank{rank}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line for line in found}


def global_batches(output: Path, num_ranks: int) -> dict[int, list[str]]:
    """Step -> digests of the rows of its global batch, sorted."""
    logs = [lines(output, rank) for rank in range(num_ranks)]
    return {step: sorted(row for log in logs for rows in log[step]["rows"] for row in split(rows)) for step in logs[0]}


def split(rows: str) -> list[str]:
    """The digests of rows, as hex, one after the other."""
    return [rows[i : i + 2 * ROW_BYTES] for i in range(0, len(rows), 2 * ROW_BYTES)]


def until_step(output: Path, step: int) -> None:
    wait_until(lambda: all(step in lines(output, rank) for rank in range(2)), START_S, f"step {step}")


@pytest.fixture(scope="module")
def one_node(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """The global batches of a run on one node, with one rank."""
    output = tmp_path_factory.mktemp("runs") / "one"
    sets = ("cluster.num_nodes=1", "cluster.component_placement={trainer: 0, dataloader: 0}")
    command = [sys.executable, str(ROOT / "deploy" / "launch.py"), *arguments(config, output, *sets)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(DS_ACCELERATOR="cpu"), capture_output=True, timeout=START_S
    )
    assert result.returncode == 0, result.stderr[-4000:]
    batches = global_batches(output, 1)
    assert sorted(batches) == list(range(1, 41))
    assert {len(rows) for rows in batches.values()} == {8}
    return batches


def test_the_batches_are_those_of_one_node_though_the_cable_is_pulled_for_a_moment(
    network: Network, config: Path, one_node: dict[int, list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with two_nodes(network, arguments(config, output), tmp_path, "--node-lost-s", "60") as launchers:
        until_step(output, 7)
        network.pull_cable("second")
        time.sleep(3)  # the fault itself
        network.plug_cable("second")
        assert [launcher.end() for launcher in launchers] == [0, 0], [one.said()[-3000:] for one in launchers]
    assert f"2 nodes have met: {network.addresses['first']}, {network.addresses['second']}" in launchers[0].said()
    for number, node in enumerate(NODES):
        assert f"[loader 0] loader-serve ready tcp://{network.addresses[node]}:" in launchers[number].said()
    assert global_batches(output, 2) == one_node


def test_a_cable_that_stays_out_ends_both_nodes_and_the_same_command_resumes(
    network: Network, config: Path, one_node: dict[int, list[str]], tmp_path: Path
) -> None:
    output, command = tmp_path / "run", arguments(config, tmp_path / "run")
    with two_nodes(network, command, tmp_path, "--node-lost-s", "10") as launchers:
        until_step(output, 13)
        network.pull_cable("second")
        try:
            assert [launcher.end() for launcher in launchers] == [1, 1]
        finally:
            network.plug_cable("second")
    there = rf"node 1 \({socket.gethostname()}, {network.addresses['second']}\) has not been heard of for 10 s"
    assert [bool(re.search(there, line)) for line in launchers[0].errors()] == [True]
    first = (
        f"node 0 (tcp://{network.addresses['first']}:29400) has not answered for 10 s (--node-lost-s): all ranks end"
    )
    assert [first in line for line in launchers[1].errors()] == [True]
    with two_torchruns(network, command, tmp_path) as launchers:
        assert [launcher.end() for launcher in launchers] == [0, 0], [one.said()[-3000:] for one in launchers]
    assert "resumed from" in launchers[0].said()
    assert global_batches(output, 2) == one_node


@pytest.fixture
def ssh(network: Network, tmp_path: Path) -> Iterator[str]:
    """The ssh command that reaches the second node's own sshd."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("NOT TESTED: a hostfile; there is no sshd (package openssh-server)")
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nListenAddress {network.addresses['second']}\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
    )
    command = [*network.prefix("second"), program, "-D", "-e", "-f", str(folder / "sshd")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    known = f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={folder}/known -o LogLevel=ERROR"
    try:
        yield f"ssh -F none -i {folder}/user -o BatchMode=yes -o ConnectTimeout=10 {known}"
    finally:
        process.terminate()
        process.wait(30)


def hostfile(network: Network, folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"{network.addresses[node]} slots=1\n" for node in NODES))
    return path


def test_a_hostfile_starts_the_other_node_and_ctrl_c_ends_both(
    network: Network, config: Path, ssh: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [
        *arguments(config, output, "trainer.epochs=50"),
        "--hostfile",
        str(hostfile(network, tmp_path)),
        "--ssh",
        ssh,
    ]
    launcher = Launcher(network, "first", command, tmp_path / "log")
    try:
        until_step(output, 3)
        assert re.search(r"\[node 1\] \[loader 0\] loader-serve ready tcp://", launcher.said())
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.end() == 130, launcher.said()[-3000:]
    finally:
        launcher.process.terminate()
        launcher.end(120)
    nothing_left(command)


def test_a_node_that_ssh_cannot_reach_is_named(network: Network, config: Path, tmp_path: Path) -> None:
    command = [*arguments(config, tmp_path / "run"), "--hostfile", str(hostfile(network, tmp_path))]
    launcher = Launcher(network, "first", command, tmp_path / "log")
    assert launcher.end() == 1
    (error,) = launcher.errors()
    assert (
        f"node 1: the launcher on {network.addresses['second']} ended with exit code 255: ssh: connect to host" in error
    )
    nothing_left(command)


def test_a_node_that_does_not_come_is_named_on_both_sides(network: Network, config: Path, tmp_path: Path) -> None:
    command = [
        *arguments(config, tmp_path / "run"),
        "--master-addr",
        network.addresses["first"],
        "--nodes-deadline-s",
        "3",
    ]
    for node, number, error in (
        ("first", "0", "the nodes have not met within 3 s (--nodes-deadline-s): nodes [1] have not come"),
        ("second", "1", f"node 0 does not answer at tcp://{network.addresses['first']}:29400"),
    ):
        launcher = Launcher(network, node, [*command, "--node-rank", number], tmp_path / f"log{number}")
        assert launcher.end() == 1
        assert [error in line for line in launcher.errors()] == [True], launcher.said()
    nothing_left(command)


def test_nodes_with_different_code_are_refused(network: Network, config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("proto", "loader_service", "trainer", "deploy"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__", ".stoker"))
    with (other / "trainer" / "loop.py").open("a") as file:
        file.write("# another version\n")
    command = [*arguments(config, tmp_path / "run"), "--master-addr", network.addresses["first"]]
    launchers = [
        Launcher(
            network,
            node,
            [*command, "--node-rank", str(number)],
            tmp_path / f"log{number}",
            [f"{root}/deploy/launch.py"],
        )
        for number, (node, root) in enumerate(zip(NODES, (ROOT, other), strict=True))
    ]
    assert [launcher.end() for launcher in launchers] == [1, 1]
    here = rf"versions differ: the code of Stoker is \w{{12}} on node 0 \({socket.gethostname()}, .* and \w{{12}} on node 1"
    for launcher in launchers:
        assert [bool(re.search(here, line)) for line in launcher.errors()] == [True], launcher.said()
    nothing_left(command)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["cluster.component_placement={trainer: 0}"], "no slot of component_placement lies on node 1 (slots 1 to 1)"),
        (["cluster.component_placement={dataloader: 0-1}"], "component_placement.trainer is empty"),
    ],
)
def test_a_placement_that_does_not_fit(
    network: Network, config: Path, tmp_path: Path, overrides: list[str], error: str
) -> None:
    with two_nodes(network, arguments(config, tmp_path / "run", *overrides), tmp_path) as launchers:
        assert [launcher.end() for launcher in launchers] == [1, 1]
        for launcher in launchers:
            assert error in launcher.errors()[0]


def test_a_port_in_use_is_named(network: Network, config: Path, tmp_path: Path) -> None:
    address = network.addresses["first"]
    listen = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 29400)); print('up', flush=True); sys.stdin.read()"
    )
    command = [*network.prefix("first"), sys.executable, "-c", listen, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"up\n"
        run = [*arguments(config, tmp_path / "run"), "--master-addr", address, "--node-rank", "0"]
        launcher = Launcher(network, "first", run, tmp_path / "log")
        assert launcher.end() == 1
        (error,) = launcher.errors()
        assert f"the launchers cannot meet at tcp://{address}:29400 (Address already in use)" in error
        other.communicate(timeout=30)
    nothing_left(run)
