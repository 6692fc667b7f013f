"""What one node of a run starts: commands and their environment. Pure, but for the files that `launch.find_devices` looks at.

placement {trainer: 0-1, dataloader: 2-3}, 2 nodes of 2 slots

node 0   ranks 0, 1    deepspeed.launcher.launch --node_rank 0 --world_info {"node0": [0, 1]}
node 1   loaders 0, 1  loader-serve --bind tcp://10.0.0.2:*
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.cluster.plan import NodePlan, place, slots_per_node
from deploy.launch import ROOT, find_devices, loader_command, loader_cores, trainer_environment, world_argument
from deploy.loaders import LoaderPlan
from deploy.nodes.meeting import tcp
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line says about processes, on every node."""

    common: tuple[str, ...]
    """`--config FILE --set ...` for loaders and ranks."""
    environment: Mapping[str, str]
    """Of all processes of this node."""
    has_loaders: bool = True
    insecure: bool = False
    slots_per_node: int | None = None
    ready_deadline_s: float = 600.0
    loader_restarts: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """What one node starts."""

    node: int
    nodes: tuple[NodePlan, ...]
    addresses: tuple[str, ...]
    """Of each node, as the others reach it."""
    devices: tuple[str, ...] | None
    """What each rank of this node gets; None on the CPU."""
    loaders: LoaderPlan
    options: RunOptions
    config: Config

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of this node."""
        return self.nodes[self.node].ranks

    @property
    def first(self) -> int:
        """The node of rank 0."""
        return next(number for number, node in enumerate(self.nodes) if 0 in node.ranks)

    @property
    def without_ranks(self) -> frozenset[int]:
        """Nodes that run loaders alone."""
        return frozenset(number for number, node in enumerate(self.nodes) if not node.ranks)

    @property
    def completion_record(self) -> Path:
        """What rank 0 writes at the end of a complete run."""
        return Path(self.config.trainer.output_dir) / "summary.json"

    def trainer(self, ready: Sequence[Mapping[str, Any]]) -> list[str]:
        """The command of this node's ranks. ready: of each node, {"loaders": addresses, "port": a free one of the node}."""
        with_ranks = [number for number, node in enumerate(self.nodes) if node.ranks]
        world = {f"node{number}": list(range(len(self.nodes[number].ranks))) for number in with_ranks}
        if self.devices is not None:  # each node's own numbers; of other nodes only the count matters here
            world[f"node{self.node}"] = [int(device) for device in self.devices]
        loaders = [address for node in ready for address in node["loaders"]] or self.config.cluster.loader_addresses
        return [
            *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
            world_argument(world),
            f"--node_rank={with_ranks.index(self.node)}",
            f"--master_addr={self.addresses[self.first]}",
            f"--master_port={ready[self.first]['port']}",
            str(ROOT / "trainer" / "main.py"),
            *self.options.common,
            *("--set", f"cluster.loader_addresses={json.dumps(list(loaders))}"),
        ]

    def trainer_environment(self, interface: str | None) -> dict[str, str]:
        """Of this node's ranks. interface: the device towards the other nodes; None: gloo takes the one of the host's name."""
        reserved = loader_cores(self.config, len(self.loaders.commands))
        result = trainer_environment(self.options.environment, len(self.ranks), self.devices, reserved)
        if interface:
            result.setdefault("GLOO_SOCKET_IFNAME", interface)
        return result


def make_local_plan(node: int, facts: Sequence[Mapping[str, Any]], config: Config, options: RunOptions) -> LocalPlan:
    """The plan of one node. facts: of each node, {"host", "address", "devices"}. Raises ConfigError, the same on all nodes.

    The exception is a node that shows fewer devices than its slots: it alone knows.
    """
    placement, devices = config.cluster.component_placement, [int(one["devices"]) for one in facts]
    per_node = options.slots_per_node or slots_per_node(placement, len(facts), devices)
    last = max((*placement.trainer, *placement.dataloader), default=-1)
    if last >= len(facts) * per_node:
        raise ConfigError(
            f"cluster.component_placement names slot {last}: {len(facts)} nodes of {per_node} slots have slots 0 to "
            f"{len(facts) * per_node - 1}; lower the slots, or raise num_nodes or --slots-per-node"
        )
    if options.slots_per_node and len({count > 0 for count in devices}) > 1:
        raise ConfigError(
            f"the nodes show {devices} devices: ranks run on the devices of all nodes or on the CPUs of all; set "
            "DS_ACCELERATOR=cpu on all nodes, or leave the others out"
        )
    nodes = place(placement, len(facts), per_node, has_gpus=True)
    if not options.has_loaders:
        nodes = tuple(NodePlan(ranks=one.ranks, devices=one.devices) for one in nodes)
    own, address = nodes[node], str(facts[node]["address"])
    found = find_devices(options.environment, own.devices) if own.ranks else None
    bind = tcp(address, 0).removesuffix("0") + "*"
    slots = [placement.dataloader[number] - node * per_node for number in own.loaders]
    loaders = [loader_command(options.common, config, len(slots), slot, bind) for slot in slots]
    insecure = ("--insecure",) if options.insecure else ()
    return LocalPlan(
        node=node,
        nodes=nodes,
        addresses=tuple(str(one["address"]) for one in facts),
        devices=tuple(found) if found is not None else None,
        loaders=LoaderPlan(
            commands=tuple((*command, *insecure) for command in loaders),
            environment=options.environment,
            ready_deadline_s=options.ready_deadline_s,
            max_restarts=options.loader_restarts,
        ),
        options=options,
        config=config,
    )
