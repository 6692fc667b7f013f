"""Runs one node: starts loaders and trainer together; when the trainer ends, the loaders drain.

Ranks import for seconds what they need. They do so while the loaders prepare, and wait for where these are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deploy.child import say, without_sigusr1
from deploy.completion import CompletionRecord
from deploy.keeper import (
    Signals,
    as_exit_code,
    group_members,
    interrupt_group,
    signal_below,
    signal_catchers,
    signal_group,
    wait_group,
)
from deploy.loaders import LoaderPlan, Loaders
from stoker_proto.host.ports import free_port
from stoker_proto.host.start import Start, StartSender

_ASK_AGAIN_S = 5.0
_KILL_GRACE_S = 10.0
"""How long SIGKILL may take to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to start, as command lines."""

    loaders: LoaderPlan
    trainer: Sequence[str]
    """The trainer's command. If there are loaders, its ranks wait on stdin for their addresses (`stoker_proto.host.start`)."""
    trainer_environment: Mapping[str, str]
    cores: str
    """How ranks and loaders share the cores, for the log."""
    completion_record: Path
    """JSON file that the trainer writes when its run is complete. Without it exit code 0 is no success."""
    trainer_grace_s: float = 45.0
    """From the stop signal to SIGKILL. It is longer than the ranks' own `trainer.checkpoint.stop_grace_s`."""
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
    record = CompletionRecord(plan.completion_record)
    loaders = Loaders(plan.loaders)
    try:
        if not plan.loaders.commands:
            trainer = start_trainer(plan.trainer, plan.trainer_environment)
            return _watch_trainer(plan, record, trainer, loaders, signals)
        with closing(StartSender()) as sender:
            trainer = start_trainer(plan.trainer, plan.trainer_environment, sender.for_ranks.fileno())
            if code := _wait_loaders(loaders, trainer, sender, signals):
                kill_trainer(trainer, signals)  # before the sender is closed, which ends the ranks with an error
                return code
            sender.send(Start(loader_addresses=tuple(loaders.addresses), master_port=free_port()))
            code = _watch_trainer(plan, record, trainer, loaders, signals)
            if code and not signals.received:
                _show_held_output(sender)
            return code
    finally:
        loaders.end(signals)


def _wait_loaders(loaders: Loaders, trainer: subprocess.Popen[bytes], sender: StartSender, signals: Signals) -> int:
    """0 when the trainer may begin, else the run's exit code after a message."""
    code = loaders.wait_ready(signals, lambda: signals.saves > 0 or trainer.poll() is not None)
    if signals.saves:
        say("launch", "SIGUSR1 while the loaders were starting")
        return os.EX_TEMPFAIL
    if code == 0 or signals.received or trainer.poll() is None:
        return code
    code = trainer_exit_code(trainer.wait())
    _show_held_output(sender)
    say(
        "launch",
        f"deepspeed ended with exit code {code} before the loaders were ready: its processes cannot start here, or were "
        "killed, for memory perhaps (see the lines above and the kernel's log)",
    )
    return code or 1


def _show_held_output(sender: StartSender) -> None:
    """What ranks had printed that crashed before they showed it."""
    for text in sender.held_output():
        for line in text.decode("utf-8", "replace").splitlines():
            say("rank", line)


def kill_trainer(trainer: subprocess.Popen[bytes], signals: Signals) -> None:
    """End ranks that have not begun: they have nothing to save, and nothing to say."""
    signal_group(trainer.pid, signal.SIGKILL)
    wait_group(trainer.pid, _KILL_GRACE_S, signals)


def _watch_trainer(
    plan: Plan, record: CompletionRecord, trainer: subprocess.Popen[bytes], loaders: Loaders, signals: Signals
) -> int:
    saving = SaveRequests(signals)
    while trainer.poll() is None and not signals.received:
        signals.wait(0.5)
        loaders.look_after(may_restart=True)
        if saving.are_asked():
            saving.pass_on(trainer.pid)
    loaders.look_after(may_restart=False)
    if not signals.received:
        code = check_left_over(trainer.pid, trainer_exit_code(trainer.wait()), plan.left_over_s, signals)
        return code or check_complete(record)
    stop, num_known = signals.received[0], len(signals.received)
    say("launch", f"{stop.name}: passed on to the trainer, which has {plan.trainer_grace_s:g} s; once more kills it")
    stop_trainer(trainer.pid, stop)
    if not wait_group(trainer.pid, plan.trainer_grace_s, signals, num_known):
        say("launch", "the trainer did not end in time and was killed")
    code = trainer_exit_code(trainer.wait())
    # After SIGINT DeepSpeed's launcher returns 1, whatever its ranks returned; 143 where it had not begun.
    return 128 + stop if code == 0 or (stop == signal.SIGINT and code in (1, 128 + signal.SIGTERM)) else code


def stop_trainer(group: int, stop: signal.Signals) -> None:
    """Pass a stop signal on to the ranks. They handle SIGTERM; a closed terminal (SIGHUP) is passed on as SIGTERM.

    DeepSpeed's launcher must not get SIGTERM: it would kill ranks that still save after 30 s. It ends by itself when a rank does.
    """
    if stop == signal.SIGINT:  # nothing is saved; DeepSpeed's launcher ends ranks that wait in a collective
        interrupt_group(group)
    else:
        signal_below(group, signal.SIGTERM)


def trainer_exit_code(code: int) -> int:
    """Exit code of DeepSpeed's launcher, as a shell returns it. Of a rank that signal n ended it returns 256 - n."""
    return as_exit_code(code - 256 if 256 - signal.SIGSYS <= code <= 256 - signal.SIGINT else code)


def start_trainer(
    command: Sequence[str], environment: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """DeepSpeed's launcher and the ranks, in a process group of their own; their output is this launcher's.

    stdin: descriptor on which ranks wait that start before the loaders are ready; by default their stdin is empty.
    """
    with without_sigusr1():
        return subprocess.Popen(list(command), env=dict(environment), stdin=stdin, process_group=0)


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
