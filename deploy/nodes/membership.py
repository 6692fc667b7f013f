"""Which node of the run this is, and where node 0 is. Pure.

--hostfile FILE                    this is node 0; the other nodes are started by ssh
--node-rank 1 --master-addr HOST   the same command on every node
srun --ntasks-per-node=1           SLURM_NODEID, SLURM_NNODES, SLURM_JOB_NODELIST
torchrun --nproc-per-node 1        GROUP_RANK, GROUP_WORLD_SIZE, MASTER_ADDR; also Kubeflow's RANK, WORLD_SIZE
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker_proto.errors import ConfigError

DEFAULT_PORT = 29400
_JOB_PORTS = 1000
"""Slurm jobs that share a node take different ports: the default one plus the job's number modulo this."""
_HOSTFILE_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.:-]+)\s+slots=(?P<slots>[1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """This node's place among the nodes of a run."""

    node: int
    num_nodes: int
    master: str
    """Name or address of node 0, as the other nodes reach it."""
    port: int = DEFAULT_PORT
    """Where the launchers meet, on node 0."""
    slots_per_node: int | None = None
    """Given by the user; None: counted."""
    others: tuple[str, ...] = ()
    """Hosts of nodes 1, 2, ... that this launcher starts by ssh."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for several nodes."""
    group = parser.add_argument_group("several nodes (cluster.num_nodes above 1)")
    add = group.add_argument
    add(
        "--hostfile",
        metavar="FILE",
        help="DeepSpeed's hostfile, one `HOST slots=N` per line: run this on the first host; ssh starts the others",
    )
    add(
        "--node-rank",
        type=int,
        metavar="N",
        help="number of this node, with the same command on every node; default: Slurm's or torchrun's variables",
    )
    add(
        "--master-addr",
        metavar="HOST",
        help="node 0, as the other nodes reach it; default: MASTER_ADDR, or Slurm's first node",
    )
    add("--port", type=int, metavar="P", help=f"port of node 0 where the launchers meet (default: {DEFAULT_PORT})")
    add(
        "--node-address",
        metavar="IP",
        help="address of this node, as the others reach it; default: the one towards node 0",
    )
    add("--slots-per-node", type=int, metavar="N", help="default: the GPUs of a node, or the hostfile's slots")
    add("--ssh", default="ssh -o BatchMode=yes -o ConnectTimeout=10", metavar="COMMAND", help="default: %(default)s")
    add("--insecure", action="store_true", help="allow loaders and launchers beyond loopback without keys")
    add(
        "--nodes-deadline-s",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds within which the launchers of all nodes must meet (default: 120)",
    )
    add(
        "--node-lost-s",
        type=float,
        default=30.0,
        metavar="S",
        help="a node that is silent for more seconds ends the run (default: 30)",
    )


def find_membership(options: argparse.Namespace, environment: Mapping[str, str], num_nodes: int) -> Membership | None:
    """This node's place; None for a run on one node. Raises ConfigError."""
    found = _of_options(options, environment, num_nodes) or _of_slurm(environment) or _of_torchrun(environment)
    if found is None:
        if num_nodes == 1:
            return None
        raise ConfigError(
            f"cluster.num_nodes is {num_nodes}, and nothing says which node this is: on node 0 pass --hostfile FILE, or start "
            "this command on every node with --node-rank N --master-addr HOST, by srun or by torchrun, or run "
            "deploy/ray_launch.py"
        )
    if found.num_nodes != num_nodes:
        raise ConfigError(
            f"cluster.num_nodes is {num_nodes}, and this run was started on {found.num_nodes} nodes: pass --set "
            f"cluster.num_nodes={found.num_nodes}, or start it on {num_nodes}"
        )
    if num_nodes == 1:
        return None
    if not 0 <= found.node < num_nodes:
        raise ConfigError(f"--node-rank is {found.node}: {num_nodes} nodes have the numbers 0 to {num_nodes - 1}")
    return Membership(
        node=found.node,
        num_nodes=num_nodes,
        master=options.master_addr or found.master,
        port=options.port or found.port,
        slots_per_node=options.slots_per_node or found.slots_per_node,
        others=found.others,
    )


def _of_options(options: argparse.Namespace, environment: Mapping[str, str], num_nodes: int) -> Membership | None:
    if options.hostfile and options.node_rank is not None:
        raise ConfigError(
            "--hostfile starts the other nodes itself, and --node-rank is for the same command on every node: pass one"
        )
    if options.hostfile:
        hosts = read_hostfile(options.hostfile)
        if len(hosts) < num_nodes:
            raise ConfigError(f"{options.hostfile} names {len(hosts)} hosts, and cluster.num_nodes is {num_nodes}")
        names = [name for name, _ in hosts[:num_nodes]]
        slots = {count for _, count in hosts[:num_nodes]}
        if len(slots) > 1:
            raise ConfigError(f"{options.hostfile}: slots are {sorted(slots)}; all nodes of a run have equally many")
        return Membership(
            node=0, num_nodes=num_nodes, master=names[0], slots_per_node=slots.pop(), others=tuple(names[1:])
        )
    if options.node_rank is None:
        return None
    master = options.master_addr or environment.get("MASTER_ADDR")
    if not master and num_nodes > 1:
        raise ConfigError("--node-rank also needs --master-addr HOST (or MASTER_ADDR): where node 0 is")
    return Membership(node=options.node_rank, num_nodes=num_nodes, master=master or "localhost")


def read_hostfile(path: str) -> list[tuple[str, int]]:
    """(host, slots) of each line. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read ({error})") from error
    hosts: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOSTFILE_LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{path}:{number}: {line.strip()!r} is no line of a hostfile: write `HOST slots=N`")
        if match["name"] in [name for name, _ in hosts]:
            raise ConfigError(f"{path}:{number}: host {match['name']} is named twice")
        hosts.append((match["name"], int(match["slots"])))
    return hosts


def _of_slurm(environment: Mapping[str, str]) -> Membership | None:
    """In a step of `srun`. A batch script itself, or an allocation without a step, is no node of a run."""
    if "SLURM_STEP_NUM_NODES" not in environment or "SLURM_NODEID" not in environment:
        return None
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES")
    num_tasks = _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else num_nodes
    if num_tasks != num_nodes:
        raise ConfigError(
            f"Slurm started {num_tasks} tasks on {num_nodes} nodes: one launcher per node starts its ranks and loaders; use srun "
            "--ntasks-per-node=1"
        )
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return Membership(
        node=_number(environment, "SLURM_NODEID"),
        num_nodes=num_nodes,
        master=first_host(listed),
        port=DEFAULT_PORT + _number(environment, "SLURM_JOB_ID") % _JOB_PORTS,
    )


def first_host(listed: str) -> str:
    """First name of a Slurm node list.

    >>> first_host("gpu[07-09,12],cpu1"), first_host("a-1,a-2"), first_host("rack[2-3]node[1-4]")
    ('gpu07', 'a-1', 'rack2node1')
    """
    inside, first = False, ""
    for sign in listed:
        if sign == "," and not inside:
            break
        inside = sign == "[" or (inside and sign != "]")
        first += sign
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first)


def _of_torchrun(environment: Mapping[str, str]) -> Membership | None:
    """torchrun's variables, or those that Kubeflow's PyTorchJob gives each pod."""
    per_node = environment.get("LOCAL_WORLD_SIZE", "1")
    names = ("GROUP_RANK", "GROUP_WORLD_SIZE") if "GROUP_RANK" in environment else ("RANK", "WORLD_SIZE")
    if not {*names, "MASTER_ADDR"} <= set(environment):
        return None
    if per_node != "1":
        raise ConfigError(
            f"torchrun started {per_node} launchers on this node: one launcher per node starts its ranks and loaders; use "
            "--nproc-per-node 1"
        )
    node, count = (_number(environment, name) for name in names)
    return Membership(node=node, num_nodes=count, master=environment["MASTER_ADDR"])


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"the environment's {name} is {text!r}, and a count is expected: unset it, or pass --node-rank"
        )
    return int(text)


def own_arguments(membership: Membership, node: int, values: Sequence[tuple[str, object]]) -> list[str]:
    """Options for the launcher of another node. values: further (option, value) pairs; None is left out."""
    pairs: list[tuple[str, object]] = [
        ("--node-rank", node),
        ("--master-addr", membership.master),
        ("--port", membership.port),
        ("--slots-per-node", membership.slots_per_node),
        *values,
    ]
    return [part for option, value in pairs if value is not None for part in (option, str(value))]
