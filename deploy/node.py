"""Runs one node: starts the loaders, then the trainer; when the trainer ends, the loaders drain."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.child import say
from deploy.completion import CompletionRecord
from deploy.keeper import Signals, as_exit_code, group_members, signal_group, wait_group
from deploy.loaders import LoaderPlan, Loaders


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to start, as command lines."""

    loaders: LoaderPlan
    trainer: Callable[[Sequence[str]], Sequence[str]]
    """Addresses of the started loaders -> the trainer's command."""
    trainer_environment: Mapping[str, str]
    completion_record: Path
    """JSON file that the trainer writes when its run is complete. Without it exit code 0 is no success."""
    trainer_grace_s: float = 45.0
    """From the stop signal to SIGKILL; DeepSpeed's own launcher gives each rank 30 s."""
    left_over_s: float = 10.0
    """How long helper processes of the trainer (an uploader of a tracker, say) may run after it."""


def run_node(plan: Plan, signals: Signals) -> int:
    """Start, watch and end all processes. Returns the exit code of the trainer, or of a loader that did not start."""
    loaders = Loaders(plan.loaders)
    try:
        return loaders.wait_ready(signals) or _run_trainer(plan, loaders, signals)
    finally:
        loaders.end(signals)


def _run_trainer(plan: Plan, loaders: Loaders, signals: Signals) -> int:
    record = CompletionRecord(plan.completion_record)
    command = plan.trainer(loaders.addresses)
    trainer = subprocess.Popen(
        list(command), env=dict(plan.trainer_environment), stdin=subprocess.DEVNULL, process_group=0
    )
    while trainer.poll() is None and not signals.received:
        signals.wait(0.5)
        loaders.look_after(may_restart=True)
    loaders.look_after(may_restart=False)
    if not signals.received:
        code = _check_left_over(trainer.pid, as_exit_code(trainer.wait()), plan.left_over_s, signals)
        return code or _check_complete(record)
    stop, num_known = signals.received[0], len(signals.received)
    say("launch", f"{stop.name}: passed on to the trainer, which has {plan.trainer_grace_s:g} s; once more kills it")
    # Trainers handle SIGTERM; a closed terminal (SIGHUP) is passed on as SIGTERM.
    signal_group(trainer.pid, signal.SIGTERM if stop == signal.SIGHUP else stop)
    if not wait_group(trainer.pid, plan.trainer_grace_s, signals, num_known):
        say("launch", "the trainer did not end in time and was killed")
    return as_exit_code(trainer.wait()) or 128 + stop


def _check_left_over(group: int, code: int, grace_s: float, signals: Signals) -> int:
    """DeepSpeed's runner exits 0 when its own child is killed, and leaves the ranks running: that is no success."""
    if signals.wait_for(lambda: not group_members(group), grace_s):
        return code
    say("launch", f"deepspeed ended with exit code {code} and left {len(group_members(group))} processes: killed")
    signal_group(group, signal.SIGKILL)
    return code or 1


def _check_complete(record: CompletionRecord) -> int:
    """Exit code of a trainer whose command ended with 0."""
    if record.is_written():
        return 0
    say(
        "launch",
        f"deepspeed ended with exit code 0, but the trainer did not write {record.path}, so the run is not complete: its "
        "processes were killed, for memory perhaps (see the kernel's log); start it again, it resumes from its newest checkpoint",
    )
    return 1
