"""Starts the launchers of a hostfile's other nodes by ssh, shows what they say, and ends with them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence

from deploy.child import Child, say
from deploy.keeper import Signals, as_exit_code, wait_group

_GRACE_S = 60.0
"""For the others' loaders to drain; the meeting has told them how the run ended."""
_PASSED_ON = ("DS_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "STOKER_")
"""Beginnings of environment variables that the other nodes get too: none that holds a secret."""


class OtherNodes:
    """Call `end` in every case."""

    def __init__(self) -> None:
        self._children: list[tuple[str, Child]] = []
        self.problem: str | None = None
        """Why a node could not be started; None while all is well."""

    def start(self, hosts: Sequence[str], command: Callable[[int, str], Sequence[str]]) -> None:
        """Start node 1 on the first host, node 2 on the second, and so on."""
        for number, host in enumerate(hosts, 1):
            child = Child(f"node {number}", command(number, host), os.environ, r"(?!)")
            self._children.append((host, child))

    def look(self) -> None:
        """See whether one has ended with an error."""
        for host, child in self._children:
            code = child.poll()
            if code and self.problem is None:
                child.drain()
                last = next((line for line in reversed(child.last_lines) if line.strip()), "it said nothing")
                self.problem = f"{child.name}: the launcher on {host} ended with exit code {as_exit_code(code)}: {last}"

    def end(self, signals: Signals) -> None:
        """Wait for all; they end by themselves once they know how the run ended."""
        for host, child in self._children:
            if not wait_group(child.group, _GRACE_S, signals):
                say("launch", f"{child.name} on {host} did not end within {_GRACE_S:g} s; its ssh was killed")
            child.drain()


def ssh_command(ssh: str, host: str, folder: str, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """Runs the command on the host, in the same folder, with the variables that are not secret."""
    variables = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith(_PASSED_ON)]
    return [*shlex.split(ssh), host, f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *variables, *command])}"]
