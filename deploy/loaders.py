"""The loaders of one node: started together, waited for, restarted when they die, drained at the end.

A restarted loader listens on the address of its predecessor, which the ranks know. They connect again by themselves. As
under systemd and Compose, a loader that ends with exit code 0 was told to stop and is not restarted.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.child import Child, say
from deploy.keeper import Signals, as_exit_code, signal_group, wait_group

READY_LINE = r"loader-serve ready (\S+)"
"""Beginning of the line that `loader-serve` prints when it is ready; the group is its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderPlan:
    """Commands and limits of the loaders of one node."""

    commands: tuple[tuple[str, ...], ...]
    """One `loader-serve` command per loader; empty: the loaders run elsewhere."""
    environment: Mapping[str, str]
    ready_deadline_s: float
    """For all loaders together, from their start to their ready line; for a restarted one, from its restart."""
    max_restarts: int = 10
    """How often one loader is restarted in a run."""
    restart_delay_s: float = 2.0
    """From a loader's death to its restart."""
    grace_s: float = 40.0
    """From SIGTERM to SIGKILL; `loader-serve` drains for at most 30 s."""


@dataclass(slots=True)
class _Slot:
    """One loader: its current process, and how often it was restarted."""

    child: Child
    command: tuple[str, ...]
    address: str = ""
    """Where ranks reach it; empty until it was ready for the first time."""
    num_restarts: int = 0
    started_at: float = field(default_factory=time.monotonic)
    restart_at: float | None = None
    """It is down until then."""
    is_ended: bool = False
    """It is down and is not restarted."""

    @property
    def is_serving(self) -> bool:
        return self.child.ready is not None and self.child.poll() is None


class Loaders:
    """Starts all loaders of the plan. Call `end` in every case afterwards."""

    def __init__(self, plan: LoaderPlan) -> None:
        self._plan = plan
        self._slots = [_Slot(self._start(f"loader {i}", command), command) for i, command in enumerate(plan.commands)]

    @property
    def addresses(self) -> list[str]:
        """Where ranks reach the loaders, once `wait_ready` has returned 0."""
        return [slot.address for slot in self._slots]

    def wait_ready(self, signals: Signals, is_over: Callable[[], bool] = lambda: False) -> int:
        """Wait for all. Returns 0 when all are ready, else an exit code after a message about what went wrong.

        is_over: whether the run ends for another reason, which the caller tells; then the exit code is 1.
        """
        loaders = [slot.child for slot in self._slots]

        def is_decided() -> bool:
            is_settled = all(loader.ready for loader in loaders) or any(loader.poll() is not None for loader in loaders)
            return is_settled or is_over()

        start = time.monotonic()
        signals.wait_for(is_decided, self._plan.ready_deadline_s)
        if signals.received:
            say("launch", f"{signals.received[0].name} while the loaders were starting")
            return 128 + signals.received[0]
        if is_over():
            return 1
        for loader in loaders:
            if (code := loader.poll()) is not None:
                loader.drain()
                _report(loader, f"ended with exit code {as_exit_code(code)} before it could be asked")
                return as_exit_code(code) or 1
        for slot in self._slots:
            if slot.child.ready is None:
                way_out = "run loader-prepare first if it is still reading the data, or raise --ready-deadline-s"
                _report(slot.child, f"was not ready within {self._plan.ready_deadline_s:g} s: {way_out}")
                return 1
            slot.address = slot.child.ready
        if loaders:
            say("launch", f"{len(loaders)} loaders ready after {time.monotonic() - start:.1f} s; starting the trainer")
        return 0

    def look_after(self, *, may_restart: bool) -> None:
        """Report each loader that has died, and restart it after a delay if it may be restarted. Call it often."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.is_ended:
                continue
            if slot.restart_at is not None:
                if may_restart and now >= slot.restart_at:
                    self._restart(slot)
            elif slot.child.poll() is not None:
                self._on_death(slot, may_restart)
            elif slot.child.ready is None and now >= slot.started_at + self._plan.ready_deadline_s:
                _report(slot.child, f"was not ready {self._plan.ready_deadline_s:g} s after its restart: killed")
                signal_group(slot.child.group, signal.SIGKILL)

    def end(self, signals: Signals) -> None:
        """Send SIGTERM to all, then wait for each; workers of a loader that has died are killed."""
        end = time.monotonic() + self._plan.grace_s
        children = [slot.child for slot in self._slots]
        for loader in children:
            if loader.poll() is None:
                loader.terminate()
            else:
                signal_group(loader.group, signal.SIGKILL)
        for loader in children:
            if not wait_group(loader.group, max(0.0, end - time.monotonic()), signals):
                say("launch", f"{loader.name} did not drain within {self._plan.grace_s:g} s and was killed")
            loader.drain()

    def _start(self, name: str, command: Sequence[str]) -> Child:
        return Child(name, command, self._plan.environment, READY_LINE)

    def _restart(self, slot: _Slot) -> None:
        # The last --bind of a command line counts.
        slot.child = self._start(slot.child.name, [*slot.command, "--bind", slot.address])
        slot.num_restarts, slot.started_at, slot.restart_at = slot.num_restarts + 1, time.monotonic(), None

    def _on_death(self, slot: _Slot, may_restart: bool) -> None:
        signal_group(slot.child.group, signal.SIGKILL)  # its workers
        slot.child.drain()
        code = as_exit_code(slot.child.poll() or 0)
        most = self._plan.max_restarts
        if code == 0:
            outcome = "is not restarted, for exit code 0 means that it was told to stop"
        elif not may_restart:
            outcome = "is not restarted, for the run is over"
        elif slot.num_restarts >= most:
            outcome = f"is not restarted: its {most} restarts are used up (--loader-restarts)"
        else:
            slot.restart_at = time.monotonic() + self._plan.restart_delay_s
            outcome = f"is restarted in {self._plan.restart_delay_s:g} s, restart {slot.num_restarts + 1} of {most}"
        slot.is_ended = slot.restart_at is None
        _report(slot.child, f"({slot.address}) died with exit code {code} and {outcome}; {self._others()}")

    def _others(self) -> str:
        num_serving = sum(slot.is_serving for slot in self._slots)
        if num_serving or any(not slot.is_ended for slot in self._slots):
            return f"{num_serving} left"
        return "none is left, and the trainer ends by trainer.feed.data_deadline_s"


def _report(loader: Child, what: str) -> None:
    say("launch", f"{loader.name} {what}; its last lines:")
    for line in list(loader.last_lines) or ["(it printed nothing)"]:
        say("launch", f"    {line}")
