"""Runs one script of a peer and reads the CPU time and the memory of everything that it starts, dead processes included.

CPU time of a process tree: user and system time of all living processes and of zombies, plus that of the children that each has
waited for. The harness is a subreaper: a process whose parent ended stays in the tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36
_MEMORY_EVERY_S = 0.5
_END_WITHIN_S = 30.0


class PeerError(Exception):
    """A peer ended early, or took too long."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The moment at which a script said something."""

    name: str
    data: Mapping[str, Any]
    wall_s: float
    """Since the script's process was started."""
    cpu_s: Mapping[str, float]
    """So far, by kind of process."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run to its end."""

    marks: Sequence[Mark]
    peak_mb: float
    """The largest sum of the proportional set sizes of all processes, read twice a second."""
    load: float
    """Load average of the machine at the start, over a minute."""


def measure(
    command: Sequence[str], env: Mapping[str, str], kinds: Mapping[str, str], log: Path, limit_s: float
) -> Measured:
    """Run a script. kinds: kind -> pattern of the command line, for processes other than the script's own (`consumer`);
    those that fit none are `workers`. Raises PeerError with the end of the log."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    load = os.getloadavg()[0]
    with log.open("w") as errors:
        began = time.monotonic()
        script = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        watch = _Watch(script, kinds, began)
        try:
            marks = list(watch.marks(limit_s))
            if script.wait(_END_WITHIN_S):
                raise PeerError(f"ended with {script.returncode}: {tail(log)}")
        except subprocess.TimeoutExpired:
            raise PeerError(f"did not end within {_END_WITHIN_S:.0f} s of its last batch") from None
        except PeerError as error:
            raise PeerError(f"{error}: {tail(log)}") from None
        finally:
            end(script)
    return Measured(marks=marks, peak_mb=watch.peak_mb, load=load)


class _Watch:
    """Reads marks; between them, memory."""

    def __init__(self, script: subprocess.Popen[bytes], kinds: Mapping[str, str], began: float) -> None:
        self._script, self._began = script, began
        self._kinds = {kind: re.compile(pattern) for kind, pattern in kinds.items()}
        self._known: dict[int, str] = {}
        self.peak_mb = 0.0

    def marks(self, limit_s: float) -> Iterator[Mark]:
        """Up to the end of the script's output."""
        assert self._script.stdin
        assert self._script.stdout
        buffer = b""
        while True:
            if time.monotonic() - self._began > limit_s:
                raise PeerError(f"took longer than {limit_s:.0f} s")
            self.peak_mb = max(self.peak_mb, sum(map(memory_mb, descendants())))
            if not select.select([self._script.stdout], [], [], _MEMORY_EVERY_S)[0]:
                continue
            data = os.read(self._script.stdout.fileno(), 1 << 16)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                wall_s = time.monotonic() - self._began
                tree = json.loads(line)
                yield Mark(name=tree.pop("mark"), data=tree, wall_s=wall_s, cpu_s=self._cpu_s())
                self._script.stdin.write(b"\n")
                self._script.stdin.flush()

    def _cpu_s(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        processes = _processes()
        for pid in _below(processes):
            user, system, dead_user, dead_system = map(int, processes[pid][11:15])
            total[self._kind(pid)] += (user + system) * TICK_S
            total["workers"] += (dead_user + dead_system) * TICK_S
        return dict(total)

    def _kind(self, pid: int) -> str:
        if pid == self._script.pid:
            return "consumer"
        if pid not in self._known:
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                return "workers"
            self._known[pid] = next((kind for kind, pattern in self._kinds.items() if pattern.search(line)), "workers")
        return self._known[pid]


def _processes() -> dict[int, list[str]]:
    """pid -> the fields of /proc/PID/stat behind the name: state, ppid, ..."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue  # it ended meanwhile
    return found


def descendants() -> list[int]:
    """All processes below the harness."""
    return _below(_processes())


def _below(processes: Mapping[int, Sequence[str]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, fields in processes.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def memory_mb(pid: int) -> float:
    """Its proportional set size: shared pages count once over all processes that share them. 0 if it ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def end(script: subprocess.Popen[bytes]) -> None:
    """End everything that the script started and that still runs, then reap it."""
    for sign, within_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + within_s
        for pid in descendants():
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
        while time.monotonic() < deadline:
            script.poll()
            if not _reap(script.pid):
                return
            time.sleep(0.05)


def _reap(script: int) -> bool:
    """Wait for orphans that ended; is any process left? The script itself is for `subprocess` to wait for."""
    left = False
    for pid in descendants():
        if pid != script:
            with contextlib.suppress(ChildProcessError):  # the child of another process below
                os.waitpid(pid, os.WNOHANG)
        left = True
    return left


def tail(log: Path) -> str:
    """The last lines of what a script wrote to its error output."""
    return log.read_text(errors="replace").strip()[-1500:]
