"""An internal network as Compose makes it: services reach each other by name, and nothing leads out."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Network:
    """One network namespace per service, joined by a bridge in a further namespace."""

    hosts: dict[str, Path]
    """Service -> its /etc/hosts: all services, and this machine's name for the service itself."""
    namespaces: dict[str, str]
    """Service -> its network namespace."""
    addresses: dict[str, str]
    hub: str
    """The namespace of the bridge, to which a port per service leads."""

    def prefix(self, service: str) -> tuple[str, ...]:
        """Put before a command that is to run in the service's namespace."""
        return "ip", "netns", "exec", self.namespaces[service]

    def pull_cable(self, service: str) -> None:
        """Packets from and to the service vanish; no connection ends."""
        _ip("-n", self.hub, "link", "set", self._port(service), "down")

    def plug_cable(self, service: str) -> None:
        """As before."""
        _ip("-n", self.hub, "link", "set", self._port(service), "up")

    def _port(self, service: str) -> str:
        return f"port{list(self.namespaces).index(service)}"


@contextmanager
def internal_network(
    services: Sequence[str], folder: Path, aliases: Mapping[str, str] | None = None
) -> Iterator[Network]:
    """A network of the services, until the block ends. Needs root; raises RuntimeError where the kernel has no namespaces.

    aliases: a further name of each; replicas of one service share it, and the name then has several addresses.
    """
    hub = f"stoker-{os.getpid()}-hub"
    namespaces = {service: f"stoker-{os.getpid()}-{number}" for number, service in enumerate(services)}
    addresses = {service: f"10.83.0.{number + 2}" for number, service in enumerate(services)}
    made = []
    try:
        for namespace in (hub, *namespaces.values()):
            _ip("netns", "add", namespace)
            made.append(namespace)
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        for number, (service, namespace) in enumerate(namespaces.items()):
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", namespace)
            _ip("-n", hub, "link", "add", port, "type", "veth", *peer)
            _ip("-n", hub, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", namespace, "address", "add", f"{addresses[service]}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", namespace, "link", "set", device, "up")
        hosts = {service: _write_hosts(service, addresses, aliases or {}, folder) for service in services}
        yield Network(hosts, namespaces, addresses, hub)
    finally:
        for namespace in made:
            _ip("netns", "delete", namespace)


def _write_hosts(service: str, addresses: dict[str, str], aliases: Mapping[str, str], folder: Path) -> Path:
    lines = ["127.0.0.1 localhost", f"{addresses[service]} {socket.gethostname()}"]
    lines += [f"{address} {name}" for name, address in addresses.items()]
    lines += [f"{addresses[name]} {alias}" for name, alias in aliases.items() if alias != name]
    file = folder / f"{service}.hosts"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {result.stderr.strip()}")
