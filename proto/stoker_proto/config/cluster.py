"""`cluster`: machines, slots, addresses, keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.placement import Placement
from stoker_proto.config.rules import at_least
from stoker_proto.config.security import SecurityConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which machines and accelerator slots do what."""

    num_nodes: int = field(default=1, metadata=at_least(1))
    """Machines that take part."""
    component_placement: Placement = field(default_factory=Placement)
    """`{trainer: 0-3, dataloader: 4-7}`: accelerator slots over the cluster in node order. One trainer rank per `trainer`
    slot, one loader per `dataloader` slot; a CPU loader takes only the count, so the two may overlap."""
    loader_addresses: tuple[str, ...] = ("tcp://127.0.0.1:5555",)
    """ZeroMQ addresses of the loaders, at least one. `deploy/launch.py` fills this in."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
