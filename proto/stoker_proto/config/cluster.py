"""`cluster`: machines, slots, addresses, keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.placement import Placement
from stoker_proto.config.rules import at_least
from stoker_proto.config.security import SecurityConfig
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which machines and accelerator slots do what."""

    num_nodes: int = field(default=1, metadata=at_least(1))
    """Machines that take part."""
    component_placement: Placement = field(default_factory=Placement)
    """`{trainer: 0-3, dataloader: 4-7}`: accelerator slots over the cluster in node order. One trainer rank per `trainer`
    slot, one loader per `dataloader` slot; a CPU loader takes only the count, so the two may overlap."""
    loader_addresses: tuple[str, ...] = ("tcp://127.0.0.1:5555",)
    """Where loaders are, at least one entry. `deploy/launch.py` fills this in.

    `tcp://HOST:PORT` is one loader. `dns://NAME:PORT` is a loader at each address of the name. `file:PATH` names a file with one
    `tcp://HOST:PORT` per line. Names and files are looked at again every `trainer.feed.discovery_s`: loaders may join and leave
    during a run.
    """
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def check(self) -> None:
        """Raises ConfigError for an entry of loader_addresses that no run could use."""
        if not self.loader_addresses:
            raise ConfigError(
                "cluster.loader_addresses is empty: name at least one loader, e.g. [tcp://127.0.0.1:5555], or leave the key out "
                "(deploy/launch.py fills it in)"
            )
        for entry in self.loader_addresses:
            parse_dns_entry(entry)
            parse_file_entry(entry)


def parse_dns_entry(entry: str) -> tuple[str, int] | None:
    """(name, port) of `dns://NAME:PORT`; None for other entries. Raises ConfigError."""
    if not entry.startswith("dns:"):
        return None
    name, _, port = entry.removeprefix("dns://").rpartition(":")
    if not entry.startswith("dns://") or not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"cluster.loader_addresses holds {entry!r}: write dns://NAME:PORT, with the port of each loader's --bind"
        )
    return name, int(port)


def parse_file_entry(entry: str) -> str | None:
    """The path of `file:PATH`; None for other entries. Raises ConfigError."""
    if not entry.startswith("file:"):
        return None
    path = entry.removeprefix("file://") if entry.startswith("file://") else entry.removeprefix("file:")
    if not path:
        raise ConfigError(
            f"cluster.loader_addresses holds {entry!r}: write file:PATH; the file has one tcp://HOST:PORT per line"
        )
    return path
