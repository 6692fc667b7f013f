"""Every process that a launcher starts ends with the launcher, even if the launcher is killed.

    launcher    what the user started: passes signals on, returns the exit code
    └── keeper      runs the body; becomes the parent of processes below it that lose theirs (PR_SET_CHILD_SUBREAPER)
        ├── loader-serve ── workers          each child leads its own process group, so that a Ctrl-C in the terminal
        └── deepspeed ── launch ── ranks     reaches it only through the keeper, in the right order

The launcher dies (SIGKILL): the kernel sends the keeper SIGTERM (PR_SET_PDEATHSIG), which then stops in good order.
The keeper dies: its children become the launcher's, which ends them. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from stoker_proto.host.process import end_with_parent

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # `nohup`: the run outlives its terminal
    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LAST_DEADLINE_S = 10.0
"""How long SIGKILL may take to show; only a process stuck in the kernel (a dead network disk) needs longer."""


class Signals:
    """Waits for stop signals and ended children together. Create one, in the main thread."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        """Stop signals so far, in order."""
        self.saves = 0
        """How often SIGUSR1 has asked for a checkpoint and the end of the run."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        # The wake-up byte closes the gap between looking at `received` and going to sleep.
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.saves += 1
        elif number != signal.SIGCHLD:
            self.received.append(signal.Signals(number))

    def wait(self, timeout_s: float) -> None:
        """Sleep until a signal comes, a child ends, or the time has passed."""
        ready, _, _ = select.select([self._read_end], [], [], max(timeout_s, 0.0))
        if ready:
            os.read(self._read_end, 4096)

    def wait_for(self, condition: Callable[[], bool], deadline_s: float, num_known: int | None = None) -> bool:
        """Wait until `condition`, the deadline, or more stop signals than `num_known` (default: those up to now)."""
        known, end = len(self.received) if num_known is None else num_known, time.monotonic() + deadline_s
        while not condition() and len(self.received) == known and time.monotonic() < end:
            self.wait(min(0.2, end - time.monotonic()))
        return condition()


def run_kept(body: Callable[[Signals], int]) -> int:
    """Run `body` in a keeper process and return its exit code, after all processes that it started have ended.

    Call it from a process without threads: it forks. Stop signals go to the keeper, where `Signals` holds them.
    """
    _become_subreaper()
    sys.stdout.flush()
    sys.stderr.flush()
    launcher = os.getpid()
    # No signal may be lost before the handlers are installed.
    passed_on = (*STOP_SIGNALS, signal.SIGUSR1)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    keeper = os.fork()
    if keeper == 0:
        os._exit(_keep(body, launcher, mask))
    handlers = {number: signal.signal(number, lambda got, frame: os.kill(keeper, got)) for number in passed_on}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    end_descendants()  # none, unless the keeper itself was killed
    return as_exit_code(code)


def _keep(body: Callable[[Signals], int], launcher: int, mask: set[int | signal.Signals]) -> int:
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would stop a background group that writes
        _become_subreaper()
        signals = Signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if not end_with_parent(launcher, signal.SIGTERM):
            return 1
        return body(signals)
    except BaseException:  # noqa: BLE001  (a process's edge: nothing may unwind into the launcher's copied stack)
        traceback.print_exc()
        return 1
    finally:
        end_descendants()
        with contextlib.suppress(OSError):  # the reader of our output may be gone
            sys.stdout.flush()
            sys.stderr.flush()


def group_members(group: int) -> list[psutil.Process]:
    """Living processes below this one whose process group is `group`, without those that only wait to be reaped."""
    members = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # ended while we looked
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def signal_group(group: int, number: signal.Signals) -> None:
    """Send the signal to a process group below this process, if it has a living member."""
    if group_members(group):
        with contextlib.suppress(ProcessLookupError):  # ended while we looked
            os.killpg(group, number)


def signal_below(group: int, number: signal.Signals) -> None:
    """Send the signal to the members of a process group without its leader; to the leader if it is alone."""
    members = group_members(group)
    for process in [one for one in members if one.pid != group] or members:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended while we looked
            process.send_signal(number)


def signal_catchers(group: int, number: signal.Signals) -> None:
    """Send the signal to those members of a process group that handle it: others would end by it."""
    for process in group_members(group):
        with contextlib.suppress(OSError):  # ended while we looked
            if _catches(process.pid, number):
                os.kill(process.pid, number)


def interrupt_group(group: int) -> None:
    """Ctrl-C for the members of a process group, its leader last: DeepSpeed's launcher sends the others SIGTERM then.

    Those that do not handle SIGTERM yet get that instead, and end: they have not begun, and SIGINT would print a traceback."""
    for process in sorted(group_members(group), key=lambda one: one.pid == group):
        with contextlib.suppress(OSError):  # ended while we looked
            os.kill(process.pid, signal.SIGINT if _catches(process.pid, signal.SIGTERM) else signal.SIGTERM)


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of the signal. Raises OSError."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def wait_group(group: int, grace_s: float, signals: Signals, num_known: int | None = None) -> bool:
    """Wait for the end of a process group. After `grace_s`, or one more stop signal, it gets SIGKILL. Returns False in that case.

    num_known: number of stop signals that the caller has handled already; default: those received until now.
    """
    if signals.wait_for(lambda: not group_members(group), grace_s, num_known):
        return True
    signal_group(group, signal.SIGKILL)
    return False


def end_descendants() -> None:
    """SIGKILL and reap all processes below this one, also those whose own parent has ended."""
    end = time.monotonic() + _LAST_DEADLINE_S
    while time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def as_exit_code(code: int) -> int:
    """Exit code as a shell gives it: a process that died of signal n (-n in Python) becomes 128 + n."""
    return 128 - code if code < 0 else code


def _become_subreaper() -> None:
    """Processes below this one whose parent ends become its children. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
