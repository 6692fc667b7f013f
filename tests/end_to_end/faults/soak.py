"""`make soak`: a client and three loaders for SOAK_MINUTES (30), with SOAK_KILLS (100) kills, and every other fault in between.

The first loader is never killed, so that its memory can be followed: it is behind a proxy that cuts, delays and swallows, it is
stopped and continued, slowed down, and strangers talk to it. The others are killed and started again, some twice in a row. Fails
where an epoch's digest is not the undisturbed one, or where memory or descriptors of client or first loader rise. Writes
build/soak/report.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.end_to_end.faults.crew import Crew, num_fds, rss_bytes, slowed
from tests.end_to_end.faults.proxy import FaultyProxy
from tests.end_to_end.faults.run import STEP_S
from tests.end_to_end.faults.soak_client import EPOCHS
from tests.end_to_end.faults.zmtp import garbage
from tests.end_to_end.fleet import ROOT, environment, run_cli, write_config, write_demonstrations
from tests.tiny_models import write_model_folder

MIB = 1 << 20
WARM_UP = 0.25
"""Share of the time after which memory is expected to stay: caches and allocators are full by then."""


@dataclass
class Series:
    """Something measured once a second, that should not rise."""

    name: str
    unit: str
    allowed: float
    """Rise over the measured time that counts as none: the noise of an allocator."""
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: float) -> None:
        self.times.append(at)
        self.values.append(value)

    def fit(self) -> tuple[float, float, float]:
        """(slope per hour, rise over the measured time, mean) of a line through all but the warm-up."""
        first = int(len(self.times) * WARM_UP)
        times, values = np.array(self.times[first:]), np.array(self.values[first:])
        slope = float(np.polyfit(times, values, 1)[0])
        return 3600 * slope, slope * float(times[-1] - times[0]), float(values.mean())

    def rises(self) -> bool:
        _, rise, mean = self.fit()
        return rise > max(self.allowed, 0.03 * mean)

    def row(self) -> str:
        per_hour, rise, mean = self.fit()
        verdict = "RISES" if self.rises() else "stays"
        return (
            f"| {self.name} | {mean:.1f} {self.unit} | {max(self.values):.1f} {self.unit} | {per_hour:+.2f} {self.unit}/h | "
            f"{rise:+.2f} {self.unit} | {verdict} |"
        )


class Client:
    """The client process, and what it said."""

    def __init__(self, config: Path, addresses: list[str], step_s: float) -> None:
        command = [sys.executable, "-m", "tests.end_to_end.faults.soak_client", str(config), str(step_s), *addresses]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.epochs: list[dict[str, float | str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.epochs.append(json.loads(line))

    def end(self) -> int:
        """Let it finish its epoch; the exit code."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            self._reader.join(10)


class Harm:
    """What is done, one thing after the other, until the time is over."""

    def __init__(self, crew: Crew, proxy: FaultyProxy, seed: int) -> None:
        self.crew, self.proxy, self.chance = crew, proxy, random.Random(seed)
        self.done: Counter[str] = Counter()
        self._mortal = threading.Lock()  # held while one of the loaders that may be killed is dealt with

    def kill(self) -> None:
        """One of the loaders that may be killed, and start it again."""
        number = self.chance.randrange(1, len(self.crew.addresses))
        with self._mortal:
            self.crew.kill(number)
            time.sleep(self.chance.uniform(0, 0.5))
            self.crew.start(number)
        self.done["SIGKILL and restart of a loader"] += 1

    def other(self) -> None:
        """One of the other faults; over when this returns."""
        name, work = self.chance.choice(
            [
                ("SIGSTOP of a loader for 0.3 to 2.5 s", self._stop),
                ("a loader at a tenth of its speed for 1 to 3 s", self._slow),
                ("flapping: two kills of a loader at once", self._flap),
                ("connections cut", self.proxy.cut),
                ("half-open connections for 0.3 to 2.5 s", self._half_open),
                ("answers delayed by 0.3 s for a while", self._delay),
                ("strangers' bytes on the port", self._strangers),
            ]
        )
        work()
        self.done[name] += 1

    def _stop(self) -> None:
        number = self.chance.randrange(len(self.crew.addresses))
        with self._mortal if number else contextlib.nullcontext():
            self.crew.signal(number, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.3, 2.5))
            self.crew.signal(number, signal.SIGCONT)

    def _slow(self) -> None:
        number = self.chance.randrange(len(self.crew.addresses))
        with self._mortal if number else contextlib.nullcontext(), slowed(self.crew.pid(number), share=0.1):
            time.sleep(self.chance.uniform(1.0, 3.0))

    def _flap(self) -> None:
        number = self.chance.randrange(1, len(self.crew.addresses))
        with self._mortal:
            for _ in range(2):
                self.crew.kill(number)
                self.crew.start(number)

    def _half_open(self) -> None:
        self.proxy.half_open = True
        time.sleep(self.chance.uniform(0.3, 2.5))
        self.proxy.heal()

    def _delay(self) -> None:
        self.proxy.down.delay_s = 0.3
        time.sleep(self.chance.uniform(0.3, 2.5))
        self.proxy.down.heal()

    def _strangers(self) -> None:
        host, port = self.crew.addresses[0].removeprefix("tcp://").split(":")
        for _ in range(20):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as peer:
                peer.sendall(garbage(self.chance))


def soak(minutes: float, kills: int, seed: int, folder: Path) -> tuple[str, bool]:
    """(report, whether all is well)."""
    (folder / "model").mkdir()
    model = write_model_folder(folder / "model")
    jsonl = write_demonstrations(folder / "demos", [3 + 5 * i % 14 for i in range(60)], size=64)
    config = write_config(folder, model, [jsonl])
    assert run_cli("prepare", "--config", str(config)).returncode == 0
    with (
        Crew(config, 3, "--set=trainer.epochs=3", log=folder / "loaders.log") as crew,
        FaultyProxy(crew.addresses[0]) as proxy,
    ):
        expected = undisturbed(config, crew)
        client = Client(config, [proxy.address, *crew.addresses[1:]], STEP_S)
        harm = Harm(crew, proxy, seed)
        series = watch(client, crew, harm, 60 * minutes, kills)
        code = client.end()
    wrong = [epoch for epoch in client.epochs if epoch["digest"] != expected[int(epoch["epoch"])]]
    gaps = sorted(float(epoch["longest_wait_s"]) for epoch in client.epochs)
    well = code == 0 and not wrong and bool(gaps) and not any(each.rises() for each in series)
    lines = [
        f"# Soak of {minutes:g} minutes, seed {seed}: {'passed' if well else 'FAILED'}",
        "",
        f"{len(client.epochs)} epochs of {sum(int(epoch['steps']) for epoch in client.epochs)} steps in all; "
        f"{len(wrong)} with another digest than the undisturbed one; the client's exit code is {code}.",
        f"Longest time without a step: {gaps[-1] if gaps else 0:.2f} s; median of the epochs' longest: "
        f"{gaps[len(gaps) // 2] if gaps else 0:.2f} s.",
        "",
        *(f"* {count} x {name}" for name, count in sorted(harm.done.items())),
        "",
        f"| after {WARM_UP:.0%} of the time | mean | highest | slope | rise | |",
        "|---|---|---|---|---|---|",
        *(each.row() for each in series),
    ]
    return "\n".join(lines) + "\n", well


def undisturbed(config: Path, crew: Crew) -> dict[int, str]:
    """Epoch -> digest."""
    client = Client(config, crew.addresses, 0.0)
    deadline = time.monotonic() + 120
    while len(client.epochs) < EPOCHS:
        assert time.monotonic() < deadline, "the undisturbed run hangs"
        time.sleep(0.05)
    client.end()
    return {int(epoch["epoch"]): str(epoch["digest"]) for epoch in client.epochs[:EPOCHS]}


def watch(client: Client, crew: Crew, harm: Harm, seconds: float, kills: int) -> list[Series]:
    """Do harm and measure until the time is over."""
    series = [
        Series("client, resident memory", "MiB", 4.0),
        Series("client, descriptors", "", 2.0),
        Series("first loader, resident memory", "MiB", 4.0),
        Series("first loader, descriptors", "", 3.0),
    ]
    began, over = time.monotonic(), threading.Event()
    errors: list[BaseException] = []

    def kill_all() -> None:
        for number in range(kills):
            if over.wait(max(0.0, began + seconds * (number + 0.5) / kills - time.monotonic())):
                return
            harm.kill()

    def harm_all() -> None:
        while not over.wait(harm.chance.uniform(0.5, 4.0)):
            harm.other()

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (the thread's edge: raised below)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (kill_all, harm_all)]
    for thread in threads:
        thread.start()
    while time.monotonic() < began + seconds and client.process.poll() is None and not errors:
        time.sleep(1.0)
        pids = client.process.pid, crew.pid(0)
        values = [value for pid in pids for value in (rss_bytes(pid) / MIB, float(num_fds(pid)))]
        for each, value in zip(series, values, strict=True):
            each.add(time.monotonic() - began, value)
    over.set()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return series


def main() -> int:
    """Exit code 0 where all is well."""
    minutes, kills = float(os.environ.get("SOAK_MINUTES", "30")), int(os.environ.get("SOAK_KILLS", "100"))
    seed = int(os.environ.get("SOAK_SEED", str(int(time.time()))))
    with tempfile.TemporaryDirectory() as folder:
        report, well = soak(minutes, kills, seed, Path(folder))
    path = ROOT / "build" / "soak" / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report)
    print(report)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
