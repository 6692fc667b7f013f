"""What one node runs: loaders until they are ready, then the trainer until it ends, then the loaders drain."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploy.child import Child, say
from deploy.keeper import Signals, as_exit_code, group_members, signal_group, wait_group

READY_LINE = r"loader-serve ready (\S+)"
"""First words of the line that `loader-serve` prints when it can be asked; the group is its bound address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to start, as command lines."""

    loaders: tuple[tuple[str, ...], ...]
    """One command per loader; empty: the loaders run elsewhere."""
    loader_environment: Mapping[str, str]
    trainer: Callable[[Sequence[str]], Sequence[str]]
    """Addresses of the started loaders -> the trainer's command."""
    trainer_environment: Mapping[str, str]
    ready_deadline_s: float
    """For all loaders together, from their start to their ready line."""
    trainer_grace_s: float = 45.0
    """From the stop signal to SIGKILL; DeepSpeed's own launcher gives each rank 30 s."""
    loader_grace_s: float = 40.0
    """From SIGTERM to SIGKILL; `loader-serve` drains for at most 30 s."""
    left_over_s: float = 10.0
    """What a trainer's helpers (a tracker's uploader, say) may take to end after it."""


def run_node(plan: Plan, signals: Signals) -> int:
    """Start, watch and end everything. Gives the exit code: the trainer's, or that of a loader which did not start."""
    loaders = [
        Child(f"loader {index}", command, plan.loader_environment, READY_LINE)
        for index, command in enumerate(plan.loaders)
    ]
    try:
        failure = _wait_ready(loaders, plan.ready_deadline_s, signals)
        return failure or _run_trainer(plan, loaders, signals)
    finally:
        _end_loaders(loaders, plan.loader_grace_s, signals)


def _wait_ready(loaders: Sequence[Child], deadline_s: float, signals: Signals) -> int:
    """0 when all loaders are ready; an exit code after having said what went wrong."""
    start = time.monotonic()

    def is_decided() -> bool:
        return all(loader.ready for loader in loaders) or any(loader.poll() is not None for loader in loaders)

    signals.wait_for(is_decided, deadline_s)
    if signals.received:
        say("launch", f"{signals.received[0].name} while the loaders were starting")
        return 128 + signals.received[0]
    for loader in loaders:
        if (code := loader.poll()) is not None:
            loader.drain()
            _report(loader, f"ended with exit code {as_exit_code(code)} before it could be asked")
            return as_exit_code(code) or 1
    for loader in loaders:
        if loader.ready is None:
            way_out = "run loader-prepare first if it is still reading the data, or raise --ready-deadline-s"
            _report(loader, f"was not ready within {deadline_s:g} s: {way_out}")
            return 1
    if loaders:
        say("launch", f"{len(loaders)} loaders ready after {time.monotonic() - start:.1f} s; starting the trainer")
    return 0


def _report(loader: Child, what: str) -> None:
    say("launch", f"{loader.name} {what}; its last lines:")
    for line in list(loader.last_lines) or ["(it printed nothing)"]:
        say("launch", f"    {line}")


def _run_trainer(plan: Plan, loaders: Sequence[Child], signals: Signals) -> int:
    command = plan.trainer([loader.ready for loader in loaders if loader.ready])
    trainer = subprocess.Popen(
        list(command), env=dict(plan.trainer_environment), stdin=subprocess.DEVNULL, process_group=0
    )
    alive = list(loaders)
    while trainer.poll() is None and not signals.received:
        signals.wait(0.5)
        alive = _notice_dead(alive)
    _notice_dead(alive)
    if not signals.received:
        return _check_left_over(trainer.pid, as_exit_code(trainer.wait()), plan.left_over_s, signals)
    stop, num_known = signals.received[0], len(signals.received)
    say("launch", f"{stop.name}: passed on to the trainer, which has {plan.trainer_grace_s:g} s; once more kills it")
    # Trainers know SIGTERM; a closed terminal means the same to them.
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


def _notice_dead(alive: Sequence[Child]) -> list[Child]:
    """Say which loaders have died, end what they left; gives those that live."""
    left = [loader for loader in alive if loader.poll() is None]
    for loader in alive:
        if loader in left:
            continue
        signal_group(loader.group, signal.SIGKILL)
        loader.drain()
        others = f"{len(left)} left" if left else "none is left, and the trainer ends by trainer.feed.data_deadline_s"
        code = as_exit_code(loader.poll() or 0)
        _report(loader, f"({loader.ready}) died with exit code {code} and is not restarted; {others}")
    return left


def _end_loaders(loaders: Sequence[Child], grace_s: float, signals: Signals) -> None:
    """SIGTERM to all at once, then wait for each; workers that a dead one left behind are killed."""
    end = time.monotonic() + grace_s
    for loader in loaders:
        if loader.poll() is None:
            loader.terminate()
        else:
            signal_group(loader.group, signal.SIGKILL)
    for loader in loaders:
        if not wait_group(loader.group, max(0.0, end - time.monotonic()), signals):
            say("launch", f"{loader.name} did not drain within {grace_s:g} s and was killed")
        loader.drain()
