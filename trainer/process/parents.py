"""The DeepSpeed processes that started this rank, and whether they still run.

    deepspeed (the runner) ── deepspeed.launcher.launch ── ranks

DeepSpeed's runner does not pass signals on. If it alone is killed, its launcher and the ranks go on training, and the same
command then starts a second trainer. Only these two programs are watched, and only if they are this rank's parent and
grandparent: a shell that started the launcher, an ssh or process 1 may end. Without /proc nothing is watched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LAUNCHER, _RUNNER = "deepspeed.launcher.launch", "deepspeed.launcher.runner"
_COMMANDS = ("deepspeed", "ds")
"""Names of the runner's scripts that pip installs."""
_NUM_ARGUMENTS = 5  # python, its options and the program; the program's own arguments follow


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedParents:
    """Process numbers of the launcher and the runner, as found at the start."""

    launcher: int
    runner: int | None = None
    """None: something else started the launcher, or the runner had ended already."""

    @classmethod
    def find(cls) -> DeepSpeedParents | None:
        """Those of this process; None if DeepSpeed's launcher did not start it, or without /proc."""
        launcher = os.getppid()
        if not _is_module(_command_line(launcher), _LAUNCHER):
            return None
        runner = parent_of(launcher)
        return cls(
            launcher=launcher, runner=runner if runner is not None and _is_runner(_command_line(runner)) else None
        )

    @property
    def launcher_is_gone(self) -> bool:
        """Whether this process has another parent now, as an orphan gets."""
        return os.getppid() != self.launcher

    @property
    def runner_is_gone(self) -> bool:
        """Whether the launcher has another parent now. A later process with the runner's number is not taken for it."""
        if self.runner is None:
            return False
        parent = parent_of(self.launcher)
        return parent is not None and parent != self.runner


def parent_of(process: int) -> int | None:
    """Process number of a process's parent; None if it cannot be read."""
    try:
        stat = (PROC / str(process) / "stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[1])  # after the name, which may contain spaces and brackets
    except (OSError, IndexError, ValueError):
        return None


def _command_line(process: int) -> list[str]:
    """The first arguments of its command line; empty if it cannot be read."""
    try:
        line = (PROC / str(process) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(argument) for argument in line.split(b"\0")[:_NUM_ARGUMENTS]]


def _is_module(command: list[str], module: str) -> bool:
    """Whether it is `python -m module` or `python path/of/the/module.py`."""
    path = "/" + module.replace(".", "/") + ".py"
    return module in command or any(argument.endswith(path) for argument in command)


def _is_runner(command: list[str]) -> bool:
    """Whether it is the runner. pip's script runs as `python [-u] .../bin/deepspeed`; a shell that mentions it is not."""
    is_python = bool(command) and Path(command[0]).name.startswith("python") and "-c" not in command[:3]
    return _is_module(command, _RUNNER) or (
        is_python and any(Path(argument).name in _COMMANDS for argument in command[1:3])
    )
