"""A rank that is interrupted, or whose starter is gone, ends with one line, also while its main thread cannot run Python."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from deploy.child import without_sigusr1
from deploy.node import Plan
from trainer import main
from trainer.process import signals
from trainer.process.parents import DeepSpeedParents, _is_runner

ROOT = Path(main.__file__).resolve().parents[1]
RANK = f"""
import ctypes, logging, os, signal, sys, threading, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "proto")!r}]
from pathlib import Path
from trainer.process import signals
from trainer.cli import set_up_logging
from trainer.process.parents import DeepSpeedParents

signal.alarm(300)  # whatever happens
set_up_logging()
said = threading.Event()
after = logging.Handler()  # the one that writes is called before
after.emit = lambda record: said.set()
logging.getLogger().addHandler(after)
found = DeepSpeedParents.find()
signals._LAUNCHER_GRACE_S = 0.5
stop = signals.StopSignals(found)
stop.describe_run = lambda: "at step 7"
if os.environ.get("GRACE_S"):
    stop.begin_training(float(os.environ["GRACE_S"]))
folder = Path(__file__).parent
(folder / "part").mkdir(exist_ok=True)
name = "rank" + os.environ.get("RANK", "0")
(folder / "part" / name).write_text(f"{{os.getpid()}} {{found}}")
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
if os.environ.get("TOGETHER"):
    os.write(signal.set_wakeup_fd(-1), bytes([signal.SIGTERM, signal.SIGINT]))
try:  # a SIGINT that comes before the wait below raises KeyboardInterrupt here
    (folder / "part" / name).rename(folder / name)
    while os.environ.get("SAVES") and not stop.requested:
        time.sleep(0.01)
    if stop.requested:
        said.wait(300)
        sys.exit(stop.requested)
    lock(mutex)
except KeyboardInterrupt:
    pass
lock(mutex)  # as a collective that never comes back: outside the interpreter, and no signal ends the wait
"""
LAUNCHER = """
import subprocess, sys
raise SystemExit(subprocess.run([sys.executable, sys.argv[1]]).returncode)
"""
_STARTED: list[subprocess.Popen[str]] = []
PATIENCE_S = 120.0
"""Ten times what the slowest start takes on a quiet machine."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a rank sees of its starters is Linux's /proc")


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    yield path
    for process in _STARTED:  # those of a test that failed
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    _STARTED.clear()


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment where deepspeed.launcher.launch is a stand-in that starts one rank and waits."""
    package = tmp_path / "stand_in" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "launch.py").write_text(LAUNCHER)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()  # or the installed one comes first
    return {**os.environ, "PYTHONPATH": str(tmp_path / "stand_in")}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.02)


def started(script: Path, count: int = 1) -> list[psutil.Process]:
    """The ranks, once they wait."""
    files = [script.with_name(f"rank{rank}") for rank in range(count)]
    wait_for(lambda: all(file.exists() for file in files), "the ranks' start")
    return [psutil.Process(int(file.read_text().split()[0])) for file in files]


def start(script: Path, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([*prefix, sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    _STARTED.append(process)
    return process


@pytest.mark.process
def test_sigterm_ends_a_rank_that_waits_outside_python(script: Path) -> None:
    process = start(script)
    started(script)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert errors.endswith("rank 0 WARNING interrupted by SIGTERM at step 7\n")
    assert errors.count("\n") == 1


@pytest.mark.process
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_during_training_a_signal_asks_the_loop_to_save(
    script: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, name: str
) -> None:
    monkeypatch.setenv("GRACE_S", "600")
    monkeypatch.setenv("SAVES", "1")
    with without_sigusr1():  # as deploy/launch.py starts ranks
        process = start(script)
    started(script)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == number, "the loop sees the signal and ends by itself"
    line = f"rank 0 WARNING {name}: a checkpoint is written after this step, then the run ends\n"
    assert errors.endswith(line)
    assert errors.count("\n") == 1


@pytest.mark.process
def test_a_rank_that_cannot_save_in_time_ends_after_the_grace(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_S", "0.1")
    process = start(script)
    started(script)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert errors.endswith("rank 0 WARNING interrupted by SIGTERM, not saved within 0.1 s, at step 7\n")


@pytest.mark.process
def test_more_sigterms_change_nothing(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher sends its own after that of `stoker-launch`, and one when another rank has saved and ended."""
    monkeypatch.setenv("GRACE_S", "2")
    process = start(script)
    started(script)
    process.terminate()
    assert process.stderr is not None
    assert "a checkpoint is written after this step" in process.stderr.readline()
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert errors.endswith("rank 0 WARNING interrupted by SIGTERM, not saved within 2 s, at step 7\n")
    assert errors.count("\n") == 1


@pytest.mark.process
@pytest.mark.parametrize("prefix", [(), ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")], ids=["default", "ignored"])
def test_ctrl_c_is_said_at_once_and_the_launchers_sigterm_adds_nothing(script: Path, prefix: tuple[str, ...]) -> None:
    """Also where the rank was started with SIGINT ignored, as it is behind `&` in a script."""
    process = start(script, *prefix)
    started(script)
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().endswith("interrupted by SIGINT at step 7\n")
    assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (143, "")


@pytest.mark.process
def test_of_signals_that_came_together_ctrl_c_is_named(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in the pipe before the thread reads: the kernel runs the handler of the later one, DeepSpeed's SIGTERM, first."""
    monkeypatch.setenv("TOGETHER", "1")
    _, errors = start(script).communicate(timeout=PATIENCE_S)
    assert errors.endswith("interrupted by SIGINT at step 7\n")
    assert errors.count("\n") == 1


@pytest.mark.process
def test_nobody_reads_what_is_said(script: Path) -> None:
    process = start(script)
    started(script)
    assert process.stderr is not None
    process.stderr.close()
    process.terminate()
    assert process.wait(PATIENCE_S) == 143


@pytest.mark.process
def test_ranks_end_with_deepspeeds_runner(script: Path) -> None:
    pytest.importorskip("deepspeed", reason="the trainer's extra is not installed")
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,
        "--num_gpus",
        "2",
        str(script),
    ]
    log = script.with_name("log")
    with log.open("w") as file:
        runner = subprocess.Popen(
            command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, stderr=file, stdout=file, start_new_session=True
        )
    try:
        ranks = started(script, 2)
        everybody = [*ranks, psutil.Process(ranks[0].ppid())]
        runner.terminate()
        assert runner.wait(PATIENCE_S) == -signal.SIGTERM
        _, left = psutil.wait_procs(everybody, timeout=PATIENCE_S)
        assert not left, log.read_text()
        said = [line for line in log.read_text().splitlines() if "WARNING the" in line or "Traceback" in line]
        assert len(said) == 1, log.read_text()
        assert said[0].endswith(f"the deepspeed command (process {runner.pid}) is gone, so this rank ends at step 7")
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(runner.pid, signal.SIGKILL)


@pytest.mark.process
def test_a_rank_ends_some_time_after_its_launcher(script: Path, stand_in: dict[str, str]) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.launch", str(script)],
        env=stand_in,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = started(script)
    launcher.kill()
    _, errors = launcher.communicate(timeout=PATIENCE_S)  # the rank holds the pipe until its end
    psutil.wait_procs(ranks, timeout=PATIENCE_S)
    assert errors.endswith(f"DeepSpeed's launcher (process {launcher.pid}) is gone, so this rank ends at step 7\n")


def test_ranks_without_a_launcher_are_still_there_when_launch_py_looks() -> None:
    """DeepSpeed's runner exits with 0 then: only ranks that are left over make the run a failure."""
    (left_over,) = (field.default for field in fields(Plan) if field.name == "left_over_s")
    assert isinstance(left_over, float)
    assert left_over + 2 < signals._LAUNCHER_GRACE_S


@pytest.mark.process
@pytest.mark.parametrize("words", [[], ["-m", "deepspeed.launcher.launch"]])
def test_other_starters_may_go(words: list[str], script: Path, stand_in: dict[str, str]) -> None:
    """A shell with nohup, an ssh that hangs up: the run goes on, with DeepSpeed's launcher between them and without."""
    command = " ".join(["nohup", sys.executable, *words, str(script)])
    shell = subprocess.Popen(
        ["sh", "-c", f"{command} > {script.with_name('log')} 2>&1 & sleep 600"], env=stand_in, start_new_session=True
    )
    try:
        (rank,) = started(script)
        seen = script.with_name("rank0").read_text().partition(" ")[2]
        assert seen == (f"DeepSpeedParents(launcher={rank.ppid()}, runner=None)" if words else "None")
        shell.kill()
        shell.wait(PATIENCE_S)
        time.sleep(2.5)
        assert rank.is_running(), script.with_name("log").read_text()
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/venv/bin/python3.11", "/venv/bin/deepspeed", "--num_gpus", "2", "trainer/main.py"], True),
        (["python", "-u", "/venv/bin/ds", "trainer/main.py"], True),
        (["python", "-m", "deepspeed.launcher.runner", "trainer/main.py"], True),
        (["bash", "-c", "cd /opt/deepspeed"], False),
        (["bash", "/home/me/deepspeed"], False),
        (["python", "-c", "/deepspeed"], False),
        (["python", "run.py", "--framework", "deepspeed"], False),
        ([], False),
    ],
)
def test_who_is_deepspeeds_runner(words: list[str], expected: bool) -> None:
    assert _is_runner(words) is expected


def test_nothing_is_watched_here() -> None:
    assert DeepSpeedParents.find() is None
