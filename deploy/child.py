"""One started program. Each line of its output is shown after its name; the newest lines are remembered."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_LINE_END = re.compile(rb"(\r\n|[\r\n])")
_MAX_LINE_BYTES = 65536
_PROGRESS_INTERVAL_S = 2.0
"""A progress bar redraws itself ten times a second, after a carriage return; here one line in two seconds is enough."""
_END_S = 120.0
"""A launcher that is told to stop saves the run and drains its loaders before it ends."""
_output_lock = threading.Lock()


def say(name: str, line: str) -> None:
    """Write `[name] line` to stderr, below a progress bar rather than into it."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    # A closed stderr must not stop the threads that read the children's output.
    with _output_lock, contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{start}[{name}] {line}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def without_sigusr1() -> Iterator[None]:
    """Programs started inside do not get SIGUSR1, unless they unblock it, as ranks do.

    Slurm sends the signal that announces a time limit to every process of a job. Loaders and DeepSpeed's launchers
    would end by it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interrupt_on_sigterm() -> None:
    """SIGTERM raises KeyboardInterrupt from now on, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def run_command(command: Sequence[str], cwd: Path) -> int:
    """Exit code of a command that shares this terminal. An interrupt is raised once the command has ended, too."""
    with subprocess.Popen(command, cwd=cwd) as process:
        try:
            return process.wait()
        except BaseException:  # a terminal tells the command too, SIGTERM does not
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            if process.poll() is None:
                process.kill()
            raise


class Child:
    """A program in its own process group. Its stdin is empty; stdout and stderr are read by one thread each."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], ready_line: str) -> None:
        """ready_line: regular expression with one group, searched at the start of each line of stdout."""
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=12)
        """Newest lines of output, progress bars left out."""
        self.ready: str | None = None
        """The text that the group of `ready_line` matched; None before."""
        self._ready_line = re.compile(ready_line)
        with without_sigusr1():
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        self.group = self._process.pid
        stdout, stderr = self._process.stdout, self._process.stderr
        if stdout is None or stderr is None:
            raise RuntimeError("Popen gave no pipes although it was asked for them")
        self._threads = [
            threading.Thread(target=self._read, args=(stdout, True), daemon=True),
            threading.Thread(target=self._read, args=(stderr, False), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """SIGTERM to the program alone, not to its group: it ends its own workers when it has drained."""
        self._process.terminate()

    def drain(self, timeout_s: float = 1.0) -> None:
        """After the program's end: wait until its output was shown. A daemon that it started may hold the pipe, hence the
        timeout."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _read(self, pipe: IO[bytes], may_be_ready: bool) -> None:
        rest, shown_at = b"", 0.0
        while block := os.read(pipe.fileno(), 65536):
            *pieces, rest = _LINE_END.split(rest + block)
            for text, end in zip(pieces[::2], pieces[1::2], strict=True):
                if end == b"\r":
                    now = time.monotonic()
                    if text.strip() and now - shown_at >= _PROGRESS_INTERVAL_S:
                        shown_at = now
                        say(self.name, _decode(text))
                else:
                    self._take_line(_decode(text), may_be_ready)
            if len(rest) > _MAX_LINE_BYTES:
                self._take_line(_decode(rest), may_be_ready)
                rest = b""
        if rest.strip():
            self._take_line(_decode(rest), may_be_ready)

    def _take_line(self, line: str, may_be_ready: bool) -> None:
        self.last_lines.append(line)
        say(self.name, line)
        if may_be_ready and self.ready is None and (match := self._ready_line.match(line)):
            self.ready = match[1]


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace").rstrip()
