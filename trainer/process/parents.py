"""Who started this rank, and whether they are still there.

    deepspeed (the runner) ── deepspeed.launcher.launch ── ranks

DeepSpeed's runner passes no signal on: killed alone, it leaves its launcher and the ranks training, and the same command
then starts a second trainer. Only these two programs are watched, and only where they are this rank's parent and its parent's: a
shell that started the launcher, an ssh or a process 1 may go without a word. Without /proc nothing is watched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LAUNCHER, _RUNNER = "deepspeed.launcher.launch", "deepspeed.launcher.runner"
_COMMANDS = ("deepspeed", "ds")
"""What pip makes of the runner."""
_NUM_WORDS = 5  # python, its options and the program; what follows are the program's own arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Starters:
    """Process numbers of the programs that were found at the start."""

    launcher: int
    runner: int | None = None
    """None: the launcher was started by something else, or the runner ended before we looked."""

    @classmethod
    def find(cls) -> Starters | None:
        """Those of this process; None where DeepSpeed's launcher did not start it, or nothing can be seen."""
        launcher = os.getppid()
        if not _is_module(_words(launcher), _LAUNCHER):
            return None
        runner = parent_of(launcher)
        return cls(launcher=launcher, runner=runner if runner is not None and _is_runner(_words(runner)) else None)

    @property
    def launcher_is_gone(self) -> bool:
        """Who is orphaned gets another parent."""
        return os.getppid() != self.launcher

    @property
    def runner_is_gone(self) -> bool:
        """Seen by the launcher's new parent, which also tells a process that got the runner's number later."""
        if self.runner is None:
            return False
        parent = parent_of(self.launcher)
        return parent is not None and parent != self.runner


def parent_of(process: int) -> int | None:
    """Number of a process's parent; None where it cannot be seen."""
    try:
        stat = (PROC / str(process) / "stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[1])  # after the name, which may hold blanks and brackets
    except (OSError, IndexError, ValueError):
        return None


def _words(process: int) -> list[str]:
    """The start of its command line; empty where it cannot be seen."""
    try:
        line = (PROC / str(process) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in line.split(b"\0")[:_NUM_WORDS]]


def _is_module(words: list[str], module: str) -> bool:
    """`python -m module` or `python path/of/the/module.py`."""
    path = "/" + module.replace(".", "/") + ".py"
    return module in words or any(word.endswith(path) for word in words)


def _is_runner(words: list[str]) -> bool:
    """pip's script comes as `python [-u] .../bin/deepspeed`; a shell whose script mentions it is no runner."""
    is_python = bool(words) and Path(words[0]).name.startswith("python") and "-c" not in words[:3]
    return _is_module(words, _RUNNER) or (is_python and any(Path(word).name in _COMMANDS for word in words[1:3]))
