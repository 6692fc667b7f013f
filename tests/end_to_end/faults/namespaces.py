"""A network of its own for a loader: a namespace and a pair of virtual Ethernet devices, whose link can go down and lose packets.

Needs root and Linux; `problem()` says what is missing, for tests to skip with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_LOSSES = (
    "netem loss {percent}%",
    # Where the kernel has no netem: a token bucket that holds hardly anything drops what comes in bursts.
    "tbf rate 2mbit burst 2kb latency 1ms",
)


def problem() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "there is no `ip` program (package iproute2)"
    name = f"stoker-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this kernel or container gives no network namespace: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Link:
    """Between us and the namespace."""

    namespace: str
    device: str
    """Our end."""
    there: str
    """Address of the other end."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command that is to run in the namespace."""
        return "ip", "netns", "exec", self.namespace

    def down(self) -> None:
        """As a pulled cable: packets vanish, no connection ends."""
        _ip("link", "set", self.device, "down")

    def up(self) -> None:
        """Plugged in again."""
        _ip("link", "set", self.device, "up")

    def lose(self, percent: int) -> str | None:
        """Lose packets of both directions; how it is done, or None where the kernel has no means."""
        for discipline in _LOSSES:
            words = discipline.format(percent=percent).split()
            ours = ["tc", "qdisc", "replace", "dev", self.device, "root", *words]
            theirs = [*self.prefix, "tc", "qdisc", "replace", "dev", "eth0", "root", *words]
            if all(subprocess.run(each, capture_output=True, check=False).returncode == 0 for each in (ours, theirs)):
                return discipline.format(percent=percent)
        return None

    def lose_nothing(self) -> None:
        """As before."""
        for prefix, device in ((), self.device), (self.prefix, "eth0"):
            subprocess.run([*prefix, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)

    def num_dropped(self) -> int:
        """Packets that the disciplines of both ends dropped."""
        total = 0
        for prefix, device in ((), self.device), (self.prefix, "eth0"):
            command = [*prefix, "tc", "-s", "qdisc", "show", "dev", device]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            total += sum(int(part.split(",")[0]) for part in said.split("dropped ")[1:])
        return total


@contextmanager
def namespace() -> Iterator[Link]:
    """A namespace with one link to us; all of it gone afterwards."""
    number = os.getpid() % 200 + 20
    link = Link(f"stoker-{os.getpid()}", f"stk{os.getpid() % 10**6}", f"10.213.{number}.2")
    try:
        _ip("netns", "add", link.namespace)
        _ip("link", "add", link.device, "type", "veth", "peer", "name", "eth0", "netns", link.namespace)
        _ip("addr", "add", f"10.213.{number}.1/24", "dev", link.device)
        _ip("link", "set", link.device, "up")
        for words in (
            ("addr", "add", f"{link.there}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            subprocess.run([*link.prefix, "ip", *words], check=True, capture_output=True)
        yield link
    finally:
        subprocess.run(["ip", "link", "del", link.device], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", link.namespace], check=False, capture_output=True)


def _ip(*words: str) -> Sequence[str]:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout.splitlines()
