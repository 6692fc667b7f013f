"""Runs one node: starts the loaders, then the trainer; when the trainer ends, the loaders drain."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.child import say, without_sigusr1
from deploy.completion import CompletionRecord
from deploy.keeper import Signals, as_exit_code, group_members, signal_catchers, signal_group, wait_group
from deploy.loaders import LoaderPlan, Loaders

_ASK_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to start, as command lines."""

    loaders: LoaderPlan
    trainer: Callable[[Sequence[str]], Sequence[str]]
    """Addresses of the started loaders -> the trainer's command."""
    trainer_environment: Mapping[str, str]
    cores: str
    """How ranks and loaders share the cores, for the log."""
    completion_record: Path
    """JSON file that the trainer writes when its run is complete. Without it exit code 0 is no success."""
    trainer_grace_s: float = 45.0
    """From the stop signal to SIGKILL; DeepSpeed's own launcher gives each rank 30 s."""
    left_over_s: float = 10.0
    """How long helper processes of the trainer (an uploader of a tracker, say) may run after it."""


class SaveRequests:
    """SIGUSR1 for the ranks, again and again: one that has not begun to train ignores it."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._next_at: float | None = None

    def are_asked(self, by_others: bool = False) -> bool:
        """Whether this launcher got SIGUSR1, or `by_others`, and it is time to tell the ranks."""
        return bool(self._signals.saves or by_others) and time.monotonic() >= (self._next_at or 0.0)

    def pass_on(self, group: int) -> None:
        """Tell the ranks, which are the members of the trainer's group that handle the signal."""
        if self._next_at is None:
            say("launch", "SIGUSR1: passed on to the ranks; the run saves a checkpoint and ends with exit code 75")
        self._next_at = time.monotonic() + _ASK_AGAIN_S
        signal_catchers(group, signal.SIGUSR1)


def run_node(plan: Plan, signals: Signals) -> int:
    """Start, watch and end all processes. Returns the exit code of the trainer, or of a loader that did not start."""
    loaders = Loaders(plan.loaders)
    try:
        code = loaders.wait_ready(signals, lambda: signals.saves > 0)
        if signals.saves:
            say("launch", "SIGUSR1 while the loaders were starting")
            return os.EX_TEMPFAIL
        return code or _run_trainer(plan, loaders, signals)
    finally:
        loaders.end(signals)


def _run_trainer(plan: Plan, loaders: Loaders, signals: Signals) -> int:
    record = CompletionRecord(plan.completion_record)
    command = plan.trainer(loaders.addresses)
    trainer = start_trainer(command, plan.trainer_environment)
    saving = SaveRequests(signals)
    while trainer.poll() is None and not signals.received:
        signals.wait(0.5)
        loaders.look_after(may_restart=True)
        if saving.are_asked():
            saving.pass_on(trainer.pid)
    loaders.look_after(may_restart=False)
    if not signals.received:
        code = check_left_over(trainer.pid, as_exit_code(trainer.wait()), plan.left_over_s, signals)
        return code or check_complete(record)
    stop, num_known = signals.received[0], len(signals.received)
    say("launch", f"{stop.name}: passed on to the trainer, which has {plan.trainer_grace_s:g} s; once more kills it")
    # Trainers handle SIGTERM; a closed terminal (SIGHUP) is passed on as SIGTERM.
    signal_group(trainer.pid, signal.SIGTERM if stop == signal.SIGHUP else stop)
    if not wait_group(trainer.pid, plan.trainer_grace_s, signals, num_known):
        say("launch", "the trainer did not end in time and was killed")
    return as_exit_code(trainer.wait()) or 128 + stop


def start_trainer(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """DeepSpeed's launcher and the ranks, in a process group of their own; their output is this launcher's."""
    with without_sigusr1():
        return subprocess.Popen(list(command), env=dict(environment), stdin=subprocess.DEVNULL, process_group=0)


def check_left_over(group: int, code: int, grace_s: float, signals: Signals) -> int:
    """Exit code of a trainer; not 0 if it left processes behind.

    Ranks may run on when DeepSpeed's launcher is killed, and DeepSpeed's runner exits with 0 then: that is no success.
    """
    if signals.wait_for(lambda: not group_members(group), grace_s):
        return code
    say("launch", f"deepspeed ended with exit code {code} and left {len(group_members(group))} processes: killed")
    signal_group(group, signal.SIGKILL)
    return code or 1


def check_complete(record: CompletionRecord) -> int:
    """Exit code of a trainer whose command ended with 0."""
    if record.is_written():
        return 0
    say(
        "launch",
        f"deepspeed ended with exit code 0, but the trainer did not write {record.path}, so the run is not complete: its "
        "processes were killed, for memory perhaps (see the kernel's log); start it again, it resumes from its newest checkpoint",
    )
    return 1
