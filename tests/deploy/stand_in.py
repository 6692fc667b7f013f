"""Small programs in the place of loaders and trainers: `python stand_in.py KIND FOLDER [ARGUMENTS ...]`.

Each appends what happens to FOLDER/events, one line per event, so that a test can read the order of things.
FOLDER also stands in every command line, so that a test can find processes that were left behind.
"""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from stoker_proto.host.start import wait_start

KIND, FOLDER, *ARGUMENTS = sys.argv[1:]
FOREVER_S = 60.0


def note(event: str) -> None:
    descriptor = os.open(Path(FOLDER) / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{event}\n".encode())
    os.close(descriptor)


def events() -> list[str]:
    file = Path(FOLDER) / "events"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def is_training() -> bool:
    return any(line.startswith("trainer") for line in events())


def on_stop(number: int, frame: FrameType | None) -> None:
    note(f"{KIND} {signal.Signals(number).name}")
    sys.exit(0 if KIND == "loader" else int(ARGUMENTS[0]) if ARGUMENTS and ARGUMENTS[0].isdecimal() else 5)


def start(kind: str, *arguments: str, new_session: bool = False) -> None:
    subprocess.Popen([sys.executable, __file__, kind, FOLDER, *arguments], start_new_session=new_session)


def complete(text: str = '{"steps": 1}') -> None:
    """As a trainer does at the end of a complete run."""
    Path(FOLDER, "summary.json").write_text(text)


def bound() -> str:
    """The address after the last --bind; without one, that of a first start."""
    return f"tcp://127.0.0.1:{ARGUMENTS[0]}" if "--bind" not in ARGUMENTS else ARGUMENTS[-1]


def stubborn() -> None:
    """Ignores signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(f"{KIND} started")
    time.sleep(FOREVER_S)


def loader() -> None:
    """Is ready, and leaves a stubborn child."""
    signal.signal(signal.SIGTERM, on_stop)
    start("stubborn", new_session="daemon" in ARGUMENTS)
    print("preparing 10%\rpreparing 20%\rpreparing 100%", file=sys.stderr, flush=True)
    print(f"loader-serve ready tcp://127.0.0.1:{ARGUMENTS[0]} 3 records", flush=True)
    note("loader started")
    time.sleep(FOREVER_S)


def broken_loader() -> None:
    print("reading shards", flush=True)
    print("loader-serve: demos/train.jsonl:7: not JSON", file=sys.stderr, flush=True)
    sys.exit(3)


def slow_loader() -> None:
    """Is never ready."""
    print("still reading shard 1", flush=True)
    time.sleep(FOREVER_S)


def mortal_loader() -> None:
    """Is killed once a trainer runs, at its first start or at each."""
    signal.signal(signal.SIGTERM, on_stop)
    is_first = not any(line.startswith("crash") for line in events())
    print(f"loader-serve ready {bound()}", flush=True)
    note(f"mortal_loader {'restarted' if '--bind' in ARGUMENTS else 'started'} {bound()}")
    if is_first or "always" in ARGUMENTS:
        wait_until(is_training)
        print("about to crash", flush=True)
        note(f"crash {os.getpid()}")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER_S)


def restarts_slowly() -> None:
    """Is killed, and the next one is never ready."""
    if "--bind" not in ARGUMENTS:
        print(f"loader-serve ready {bound()}", flush=True)
        wait_until(is_training)
        os.kill(os.getpid(), signal.SIGKILL)
    note("restarted")
    time.sleep(FOREVER_S)


def polite_loader() -> None:
    """Is told to stop by somebody else."""
    print(f"loader-serve ready {bound()}", flush=True)
    wait_until(is_training)
    note(f"crash {os.getpid()}")


def trainer() -> None:
    """Stops when told, with the exit code that is its argument."""
    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, on_stop)
    note(f"trainer started {' '.join(ARGUMENTS)}")
    time.sleep(FOREVER_S)


def ends_with() -> None:
    """A trainer that ends with this exit code."""
    print("step 1 loss 2.5", flush=True)
    note(f"trainer started {' '.join(ARGUMENTS[1:])}")
    complete()
    sys.exit(int(ARGUMENTS[0]))


def is_killed() -> None:
    """As deepspeed does when its launcher and the ranks are killed; perhaps while rank 0 writes."""
    note("trainer started")
    if ARGUMENTS:
        complete(ARGUMENTS[0])


def outlives_a_loader() -> None:
    """A trainer that ends once crashed loaders have been noticed: reaped by the launcher."""
    note("trainer started")
    wait_until(lambda: sum(line.startswith("crash") for line in events()) == int(ARGUMENTS[0]))
    crashed = [line.split()[1] for line in events() if line.startswith("crash")]
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in crashed))
    complete()


def awaits() -> None:
    """A trainer that ends once this event has happened."""
    note("trainer started")
    wait_until(lambda: ARGUMENTS[0] in events())
    complete()


def saves_late() -> None:
    """As a rank: SIGUSR1 counts only once it trains."""
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: (asked.append(1), note(f"asked {len(asked)}")))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    note("trainer started")
    wait_until(lambda: len(asked) == 2)
    sys.exit(75)


def launches() -> None:
    """As DeepSpeed does, which would end by SIGUSR1 itself."""
    sys.exit(subprocess.run([sys.executable, __file__, "saves_late", FOLDER], check=False).returncode)


def launches_ranks() -> None:
    """As DeepSpeed's launcher: it passes SIGTERM on, and ends the other ranks once one has ended."""
    ranks = [subprocess.Popen([sys.executable, __file__, "saving_rank", FOLDER, str(rank)]) for rank in range(2)]

    def end(number: int, frame: FrameType | None) -> None:
        note(f"launcher {signal.Signals(number).name}")
        for rank in ranks:
            rank.terminate()

    signal.signal(signal.SIGTERM, end)
    codes = [rank.wait() for rank in ranks]
    sys.exit(max(codes))


def saving_rank() -> None:
    """A rank that ends once both were told to."""
    signal.signal(signal.SIGTERM, lambda number, frame: note(f"rank {ARGUMENTS[0]} {signal.Signals(number).name}"))
    note(f"rank {ARGUMENTS[0]} started")
    wait_until(lambda: {"rank 0 SIGTERM", "rank 1 SIGTERM"} <= set(events()))
    time.sleep(0.3)  # what else comes is noted too
    sys.exit(143)


def leaves_ranks() -> None:
    """A trainer that ends and leaves a stubborn child."""
    start("stubborn")
    note("trainer started")


def late_loader() -> None:
    """Is ready once a rank waits for it."""
    signal.signal(signal.SIGTERM, on_stop)
    wait_until(lambda: "rank waits" in events())
    if "rank waits" not in events():
        sys.exit("no rank runs while this loader prepares")
    print(f"loader-serve ready {bound()}", flush=True)
    time.sleep(FOREVER_S)


def killed_early() -> None:
    """A trainer whose processes are killed before it can be told anything."""


def wait_to_begin() -> None:
    """As ranks do: the launcher says where the loaders are. A launcher that has failed or died says nothing."""
    if KIND == "killed_early":
        from trainer.process.early import HeldOutput

        with HeldOutput():
            print("no room for a library", flush=True)
            note("rank waits")
            if "late" in ARGUMENTS:
                wait_start(FOREVER_S)
            os.kill(os.getpid(), signal.SIGKILL)
    note("rank waits")
    start = wait_start(FOREVER_S)
    if start is None:
        sys.exit(1)
    ARGUMENTS.extend(start.loader_addresses)


KINDS: dict[str, Callable[[], None]] = {
    "stubborn": stubborn,
    "stubborn_trainer": stubborn,
    "launches_ranks": launches_ranks,
    "saving_rank": saving_rank,
    "loader": loader,
    "broken_loader": broken_loader,
    "slow_loader": slow_loader,
    "mortal_loader": mortal_loader,
    "restarts_slowly": restarts_slowly,
    "polite_loader": polite_loader,
    "trainer": trainer,
    "exit": ends_with,
    "is_killed": is_killed,
    "outlives_a_loader": outlives_a_loader,
    "awaits": awaits,
    "saves_late": saves_late,
    "launches": launches,
    "leaves_ranks": leaves_ranks,
    "late_loader": late_loader,
    "killed_early": killed_early,
}

if __name__ == "__main__":
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        wait_to_begin()
    KINDS[KIND]()
