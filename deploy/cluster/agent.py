"""Starts the processes of one node, and reports their state. Runs as a Ray actor; does not import Ray.

Its private folder holds the keys of the run, and the file from which this node's ranks learn where the loaders are.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.child import Child
from deploy.completion import CompletionRecord
from deploy.loaders import READY_LINE
from stoker_proto.host.ports import free_port

FOLDER = "{folder}"
"""Stands in commands for the agent's private folder."""
LOADERS_FILE = "loaders.txt"


class Agent:
    """One per node. Its methods are called one after the other."""

    def __init__(self, files: Mapping[str, str], working_folder: str) -> None:
        """files: name -> content, readable by this user alone. working_folder: of the programs."""
        self._working_folder = working_folder
        self._folder = Path(tempfile.mkdtemp(prefix="stoker-"))
        self._children: dict[str, Child] = {}
        self._completion: CompletionRecord | None = None
        for name, content in files.items():
            with open(self._folder / name, "w", opener=_private) as file:
                file.write(content)
        self.list_loaders([])

    def where(self) -> str:
        """This host's name, for messages."""
        return socket.gethostname()

    def free_port(self) -> int:
        """A free TCP port of this host."""
        return free_port("")

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that do not exist here."""
        return [path for path in paths if not Path(self._working_folder, path).exists()]

    def list_loaders(self, addresses: Sequence[str]) -> None:
        """Tell this node's ranks where the loaders are now."""
        new = self._folder / f"{LOADERS_FILE}.new"
        new.write_text("".join(f"{address}\n" for address in addresses))
        new.replace(self._folder / LOADERS_FILE)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], end_signal: int) -> None:
        """Start a program whose output is shown after its name. It gets the signal if this agent ends before it."""
        filled = [part.replace(FOLDER, str(self._folder)) for part in command]
        bound = [sys.executable, "-m", "deploy.cluster.bound", str(os.getpid()), str(end_signal)]
        bound += [self._working_folder, *filled]
        self._children[name] = Child(name, bound, {**os.environ, **environment}, READY_LINE)

    def poll(self) -> dict[str, tuple[int | None, str | None]]:
        """Name of each program -> (exit code or None, address of a loader that is ready or None)."""
        return {name: (child.poll(), child.ready) for name, child in self._children.items()}

    def last_lines(self, name: str) -> list[str]:
        """Newest lines of output of a program that ended."""
        self._children[name].drain()
        return list(self._children[name].last_lines)

    def forget(self, name: str) -> None:
        """The program has ended and was dealt with."""
        del self._children[name]

    def signal(self, name: str, number: int) -> None:
        """SIGTERM goes to the program, SIGKILL to its whole group."""
        child = self._children.get(name)
        if child is None or child.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(child.group, signal.SIGKILL)
        else:
            os.kill(child.group, number)

    def watch_completion(self, path: str) -> None:
        """Remember the run's record as it is before the ranks start."""
        self._completion = CompletionRecord(Path(path))

    def is_complete(self) -> bool:
        """Whether the run's record was written since."""
        return self._completion is not None and self._completion.is_written()

    def close(self) -> None:
        """Kill what still runs, and remove the private folder."""
        for name in list(self._children):
            self.signal(name, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
