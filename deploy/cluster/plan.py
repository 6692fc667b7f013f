"""Which node of a cluster runs what. Pure.

    num_nodes: 2, {trainer: 0-3, dataloader: 4-7}, 4 slots per node

    node 0   rank 0  rank 1  rank 2  rank 3      slots 0-3
    node 1   loader 0 ... loader 3               slots 4-7

Slots are counted over the cluster in node order, as `cluster.component_placement` says. Ranks of neighbouring slots share a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stoker_proto.config.placement import Placement
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """What one node runs."""

    ranks: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    """The slot of each rank on its node: as many GPUs are reserved, and Ray chooses which. Empty on a cluster without GPUs."""
    loaders: tuple[int, ...] = ()
    """Numbers of loaders, over the cluster."""

    def resources(self, loader_cores: int, data_resource: str | None) -> dict[str, float]:
        """What the node must have free: a core per rank, `loader_cores` per loader, a GPU per device."""
        needed = {"CPU": float(max(1, len(self.ranks) + loader_cores * len(self.loaders)))}
        if self.devices:
            needed["GPU"] = float(len(self.devices))
        if self.loaders and data_resource:
            needed[data_resource] = 1.0
        return needed


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """Everything to start, as command lines."""

    nodes: tuple[NodePlan, ...]
    resources: tuple[dict[str, float], ...]
    """What each node must have free."""
    files: Mapping[str, str]
    """Keys of the run: name -> content, for each agent's private folder."""
    loader: Callable[[str], Sequence[str]]
    """Address of a node -> the command of a loader there."""
    rank: Sequence[str]
    """The command of a rank."""
    rank_environment: Mapping[str, str]
    working_folder: str
    """Of every process, on every node; relative paths of the config start here."""
    data_paths: tuple[str, ...]
    """Local folders and files that a node with loaders must have."""
    completion_record: str
    nodes_deadline_s: float
    """For room on the cluster: at the start, and after a node died."""
    ready_deadline_s: float
    """For all loaders together, at the start."""
    loader_restarts: int
    trainer_restarts: int
    grace_s: float = 45.0
    """From SIGTERM to SIGKILL."""


def restart_pause_s(num_restarts: int) -> float:
    """How long to wait before this restart of a loader, counted from 1: longer each time, a minute at most."""
    return min(60.0, 2.0**num_restarts)


def slots_per_node(placement: Placement, num_nodes: int, gpus: Sequence[int]) -> int:
    """How many slots a node has: its GPUs; without GPUs as many as make the highest slot fit. Raises ConfigError.

    gpus: number of GPUs of each living node.
    """
    needed = max((*placement.trainer, *placement.dataloader), default=-1) + 1
    with_gpus = sorted((count for count in gpus if count), reverse=True)[:num_nodes]
    if not with_gpus:
        return -(-needed // num_nodes)
    if len(with_gpus) < num_nodes or len(set(with_gpus)) > 1:
        raise ConfigError(
            f"cluster.num_nodes is {num_nodes}, and the GPUs of the cluster's nodes are {list(gpus)}: slots count over nodes "
            "with equally many GPUs; start the cluster with such nodes, or lower num_nodes"
        )
    if needed > num_nodes * with_gpus[0]:
        raise ConfigError(
            f"cluster.component_placement names slot {needed - 1}: {num_nodes} nodes of {with_gpus[0]} GPUs have slots 0 to "
            f"{num_nodes * with_gpus[0] - 1}"
        )
    return with_gpus[0]


def place(placement: Placement, num_nodes: int, per_node: int, *, has_gpus: bool) -> tuple[NodePlan, ...]:
    """The plan of each node. Raises ConfigError."""
    if not placement.trainer:
        raise ConfigError(
            "cluster.component_placement.trainer is empty: name the slots to train on, e.g. `trainer: 0-1`"
        )
    plans = []
    for node in range(num_nodes):
        here = range(node * per_node, (node + 1) * per_node)
        ranks = [(rank, slot - here.start) for rank, slot in enumerate(placement.trainer) if slot in here]
        loaders = tuple(number for number, slot in enumerate(placement.dataloader) if slot in here)
        devices = tuple(device for _, device in ranks) if has_gpus else ()
        plans.append(NodePlan(ranks=tuple(rank for rank, _ in ranks), devices=devices, loaders=loaders))
    if idle := [node for node, plan in enumerate(plans) if not plan.ranks and not plan.loaders]:
        raise ConfigError(
            f"cluster.num_nodes is {num_nodes}, and no slot of component_placement lies on node {idle[0]} (slots "
            f"{idle[0] * per_node} to {(idle[0] + 1) * per_node - 1}): lower num_nodes, or name its slots"
        )
    return tuple(plans)


def does_not_fit(needed: Sequence[Mapping[str, float]], nodes: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Error text: the resources that each node must have, and those that the cluster has.

    nodes: (address, resources) of each living node.
    """
    asked = "; ".join(_shown(one) for one in needed)
    there = "; ".join(f"{address}: {_shown(resources)}" for address, resources in nodes)
    return (
        f"the placement does not fit. Asked, each on a node of its own: {asked}. The cluster has {there or 'no node'}"
    )


def _shown(resources: Mapping[str, float]) -> str:
    """CPU, GPU and the user's own resources."""
    own = {
        name: count
        for name, count in resources.items()
        if ":" not in name and name not in ("memory", "object_store_memory")
    }
    return ", ".join(f"{count:g} {name}" for name, count in sorted(own.items())) or "nothing"
