"""Which node this is: from options, a hostfile, Slurm's and torchrun's variables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.nodes.membership import Membership, add_arguments, find_membership, first_host
from stoker_proto.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
}


def found(num_nodes: int, *arguments: str, environment: Mapping[str, str] | None = None) -> Membership | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return find_membership(parser.parse_args(arguments), environment or {}, num_nodes)


def test_one_node_is_no_cluster() -> None:
    assert found(1) is None
    assert found(1, "--node-rank", "0") is None
    assert found(1, environment={**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_the_same_command_on_every_node() -> None:
    assert found(2, "--node-rank", "1", "--master-addr", "a", "--port", "7000") == Membership(
        node=1, num_nodes=2, master="a", port=7000
    )
    assert found(2, "--node-rank", "0", environment={"MASTER_ADDR": "b"}) == Membership(node=0, num_nodes=2, master="b")


def test_slurm_s_and_torchrun_s_variables() -> None:
    assert found(3, environment=SLURM) == Membership(node=1, num_nodes=3, master="gpu07", port=29400 + 711)
    assert found(2, environment=TORCHRUN) == Membership(node=1, num_nodes=2, master="10.0.0.1")
    kubeflow = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "RANK": "3", "WORLD_SIZE": "4"}
    assert found(4, environment=kubeflow) == Membership(node=3, num_nodes=4, master="job-master-0")
    options = ("--node-rank", "2", "--master-addr", "c")
    assert found(3, *options, environment=SLURM) == Membership(node=2, num_nodes=3, master="c"), "options come first"


@pytest.mark.parametrize(
    ("listed", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("a-1,a-2", "a-1"), ("solo", "solo"), ("rack[2-3]node[1-4]", "rack2node1")],
)
def test_the_first_host_of_a_node_list(listed: str, first: str) -> None:
    assert first_host(listed) == first


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two of three are used\nnode-a slots=4\n\nnode-b slots=4  # beside it\nnode-c slots=4\n")
    assert found(2, "--hostfile", str(path)) == Membership(
        node=0, num_nodes=2, master="node-a", slots_per_node=4, others=("node-b",)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("node-a 4\n", ":1: 'node-a 4' is no line of a hostfile: write `HOST slots=N`"),
        ("-oProxyCommand=x slots=1\n", "is no line of a hostfile"),
        ("a slots=1\na slots=1\n", ":2: host a is named twice"),
        ("a slots=1\nb slots=2\n", r"slots are \[1, 2\]; all nodes of a run have equally many"),
        ("a slots=1\n", "names 1 hosts, and cluster.num_nodes is 2"),
    ],
)
def test_a_bad_hostfile(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        found(2, "--hostfile", str(path))


@pytest.mark.parametrize(
    ("num_nodes", "arguments", "environment", "message"),
    [
        (2, [], {}, "cluster.num_nodes is 2, and nothing says which node this is: on node 0 pass --hostfile FILE, or"),
        (2, ["--node-rank", "0"], {}, "--node-rank also needs --master-addr HOST"),
        (2, ["--node-rank", "2", "--master-addr", "a"], {}, "--node-rank is 2: 2 nodes have the numbers 0 to 1"),
        (2, ["--node-rank", "0", "--hostfile", "h"], {}, "pass one"),
        (2, ["--hostfile", "/no/such/file"], {}, "--hostfile /no/such/file cannot be read"),
        (1, [], SLURM, "cluster.num_nodes is 1, and this run was started on 3 nodes: pass --set cluster.num_nodes=3"),
        (3, [], {**SLURM, "SLURM_STEP_NUM_TASKS": "12"}, "Slurm started 12 tasks on 3 nodes: one launcher per node"),
        (2, [], {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "torchrun started 8 launchers on this node"),
        (2, [], {**TORCHRUN, "GROUP_RANK": "one"}, "the environment's GROUP_RANK is 'one', and a count is expected"),
    ],
)
def test_what_cannot_be_is_said(
    num_nodes: int, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        found(num_nodes, *arguments, environment=environment)
    assert message in str(caught.value)
