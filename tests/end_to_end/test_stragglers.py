"""Two real loaders; one is killed, stopped, or slowed: the stream is the same, and the trainer hardly waits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.config.reader import load_config
from tests.end_to_end.fleet import Loader, serving, write_config, write_demonstrations
from tests.support.slowness import slowness
from trainer.feed.client.pace import BURST
from trainer.feed.client.tickets import TicketCounters
from trainer.feed.feed import Feed

SAMPLES, ROWS = 3200, 16
FAULT_AT_STEP = 60
GAP_S = 4.0
"""Below one second where nothing else runs; by PINGs alone it would be 7 s, by the longest deadline 10 s."""
KILLED_GAP_S = 2.0
"""Promised by default settings."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A config over 80 trajectories of 40 timesteps, 200 global batches."""
    folder = tmp_path_factory.mktemp("stragglers")
    demos = write_demonstrations(folder / "demos", [40] * (SAMPLES // 40))
    return write_config(folder, model, [demos], order={"lanes": 16, "window_records": 2, "cell": 8})


class Run:
    """What one pull over two loaders gave."""

    def __init__(self, config: Path, loaders: tuple[Loader, Loader], fault: Callable[[], None]) -> None:
        """fault: called when FAULT_AT_STEP was trained."""
        connect = f"cluster.loader_addresses=[{','.join(loader.address for loader in loaders)}]"
        sizes = (f"trainer.micro_batch_size={ROWS}", f"trainer.global_batch_size={ROWS}")
        self.keys: list[list[int]] = []
        self.longest_wait_s = 0.0
        with Feed(load_config(config, [connect, *sizes]), "train", 0, 1) as feed:
            feed.connect(0)
            for batch in feed.steps(0, 0):
                self.keys += batch.micro_batches[0].keys[: batch.micro_batches[0].num_rows].tolist()
                if batch.step == FAULT_AT_STEP:
                    fault()
                if batch.step >= FAULT_AT_STEP:
                    self.longest_wait_s = max(self.longest_wait_s, batch.wait_s)
            self.counters: TicketCounters = feed.counters()


def processes(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes(int(child))


def send(loader: Loader, sign: signal.Signals) -> None:
    for pid in list(processes(loader.process.pid)):
        os.kill(pid, sign)


@contextmanager
def going_on_after(loader: Loader) -> Iterator[None]:
    """A loader that may be stopped in the block runs again behind it."""
    try:
        yield
    finally:
        if loader.process.poll() is None:
            send(loader, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Run:
    with serving(config) as first, serving(config) as second:
        return Run(config, (first, second), lambda: None)


def test_without_faults_next_to_nothing_is_asked_for_twice(undisturbed: Run) -> None:
    counters = undisturbed.counters
    assert np.unique(np.array(undisturbed.keys), axis=0).shape == (SAMPLES, 3)
    assert counters.tickets >= SAMPLES / ROWS
    assert counters.hedges <= 0.05 * counters.tickets + BURST
    assert counters.hedges_won <= counters.hedges


@pytest.mark.parametrize(("sign", "gap_s"), [(signal.SIGKILL, KILLED_GAP_S), (signal.SIGSTOP, GAP_S)])
def test_a_loader_that_is_killed_or_stopped_is_done_without(
    config: Path, undisturbed: Run, sign: signal.Signals, gap_s: float
) -> None:
    before = slowness()
    with serving(config) as first, serving(config) as second, going_on_after(first):
        run = Run(config, (first, second), lambda: send(first, sign))
    assert run.keys == undisturbed.keys
    assert run.longest_wait_s < gap_s * max(before, slowness()), run.counters


def test_a_slow_loader_does_not_set_the_pace(config: Path, undisturbed: Run) -> None:
    """It gets a tenth of the time, in slices: every PING is answered in the end."""
    over, threads, before = threading.Event(), [], slowness()

    def slow_down(loader: Loader) -> None:
        while not over.is_set():
            send(loader, signal.SIGSTOP)
            over.wait(0.27)
            send(loader, signal.SIGCONT)
            over.wait(0.03)

    with serving(config) as first, serving(config) as second, going_on_after(first):
        threads.append(threading.Thread(target=slow_down, args=(first,)))
        try:
            run = Run(config, (first, second), threads[0].start)
        finally:
            over.set()
            threads[0].join()
    assert run.keys == undisturbed.keys
    assert run.longest_wait_s < GAP_S * max(before, slowness()), run.counters
    assert run.counters.takeovers + run.counters.hedges > 0
    assert run.counters.hedges <= 0.05 * run.counters.tickets + BURST
