"""Whatever happens to the launcher, its loaders and its trainer: the exit code is right and no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deploy.keeper import interrupt_group

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WAIT_S = 60.0
"""For what takes a second at most on a quiet machine."""


class Run:
    """One launcher under test, with stand-ins for the programs that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(
        self,
        *,
        loaders: list[list[str]],
        trainer: list[str],
        of_loaders: dict[str, float] | None = None,
        hang_up: signal.Handlers = signal.SIG_DFL,
        **options: float,
    ) -> "Run":
        """of_loaders: fields of LoaderPlan; hang_up: how SIGHUP stands for the launcher; options: fields of Plan."""

        def stand_in(kind: str, *arguments: str) -> list[str]:
            return [sys.executable, str(HERE / "stand_in.py"), kind, str(self.folder), *arguments]

        plan = {
            "loaders": {
                "commands": [stand_in(*loader) for loader in loaders],
                "ready_deadline_s": 20.0,
                "grace_s": 0.4,  # stand-ins leave workers that ignore SIGTERM
                "restart_delay_s": 0.1,
                **(of_loaders or {}),
            },
            "trainer": stand_in(*trainer),
            "completion_record": str(self.folder / "summary.json"),
            **options,
        }
        before = signal.signal(signal.SIGHUP, hang_up)  # inherited, whatever started the tests
        try:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "run_plan.py"), json.dumps(plan)],
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr. Both pipes close only when nobody holds them any more."""
        assert self.process is not None
        stdout, stderr = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, stdout, stderr

    def events(self) -> list[str]:
        file = self.folder / "events"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, *events: str) -> None:
        wait_until(lambda: set(events) <= set(self.events()), f"{events} in {self.events()}")

    def left(self) -> list[int]:
        """Living stand-ins of this run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            if "stand_in.py" in " ".join(command) and str(self.folder) in command:
                found.append(process.pid)
        return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    if run.process is not None and run.process.poll() is None:
        run.process.kill()
        run.process.communicate(timeout=WAIT_S)
    wait_until(lambda: not run.left(), "no process left behind")


def test_the_trainer_gets_the_addresses_and_its_exit_code_is_the_launchers(run: Run) -> None:
    run.start(loaders=[["loader", "7001"], ["loader", "7002"]], trainer=["exit", "7"])
    code, stdout, stderr = run.end()
    assert code == 7
    assert stdout == "step 1 loss 2.5\n", "the trainer's output is inherited as it is"
    assert "trainer started tcp://127.0.0.1:7001 tcp://127.0.0.1:7002" in run.events()
    assert "[loader 0] loader-serve ready tcp://127.0.0.1:7001 3 records\n" in stderr
    assert "[loader 1] loader-serve ready tcp://127.0.0.1:7002 3 records\n" in stderr
    assert "[loader 0] preparing 100%\n" in stderr
    assert "preparing 20%" not in stderr, "a progress bar's redraws are thinned out"
    assert run.events().count("loader SIGTERM") == 2, "both loaders were asked to drain"
    assert not run.left(), "also the workers that ignore SIGTERM"


@pytest.mark.parametrize(
    ("sent", "received", "trainers", "code"),
    [
        ("SIGTERM", "SIGTERM", 5, 5),
        ("SIGINT", "SIGINT", 5, 5),
        ("SIGHUP", "SIGTERM", 5, 5),
        ("SIGINT", "SIGINT", 1, 130),  # DeepSpeed's launcher ends with 1, whatever its ranks ended with
        ("SIGTERM", "SIGTERM", 1, 1),  # a rank could not save
        ("SIGTERM", "SIGTERM", 241, 143),  # 256 - 15: a rank was still importing
    ],
)
def test_a_stop_signal_reaches_the_trainer_first_and_then_the_loaders(
    run: Run, sent: str, received: str, trainers: int, code: int
) -> None:
    run.start(loaders=[["loader", "7001"]], trainer=["trainer", str(trainers)])
    run.wait_for("loader started", f"trainer started {trainers} tcp://127.0.0.1:7001")
    os.kill(run.pid, signal.Signals[sent])
    assert run.end()[0] == code
    stops = [event for event in run.events() if "SIG" in event]
    assert stops == [f"trainer {received}", "loader SIGTERM"]
    assert not run.left()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_ranks_are_told_to_save_once_and_deepspeeds_launcher_is_not(run: Run, sent: signal.Signals) -> None:
    """It would tell them again, and kill those that are not done after 30 s."""
    run.start(loaders=[], trainer=["launches_ranks"])
    run.wait_for("rank 0 started", "rank 1 started")
    os.kill(run.pid, sent)
    assert run.end()[0] == 143
    assert sorted(event for event in run.events() if "SIG" in event) == ["rank 0 SIGTERM", "rank 1 SIGTERM"]


def test_ctrl_c_reaches_deepspeeds_launcher_last_and_as_sigterm_whoever_has_no_handler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher, which leads the group, sends the others SIGTERM at once: they must have got SIGINT before."""
    script = "trap 'exit 7' INT TERM; sleep 60 & sleep 60 & echo; wait"
    with subprocess.Popen(["sh", "-c", script], process_group=0, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        below = psutil.Process(leader.pid).children()
        wait_until(lambda: [one.name() for one in below] == ["sleep", "sleep"], "both have begun")
        sent, kill = list[tuple[int, int]](), os.kill

        def noted(pid: int, number: int) -> None:
            sent.append((pid, number))
            kill(pid, number)

        monkeypatch.setattr(os, "kill", noted)
        interrupt_group(leader.pid)
        assert leader.wait(WAIT_S) == 7
    assert sorted(sent[:-1]) == sorted((one.pid, signal.SIGTERM) for one in below)
    assert sent[-1] == (leader.pid, signal.SIGINT)


def test_under_nohup_a_hang_up_ends_nothing(run: Run) -> None:
    run.start(loaders=[["loader", "7001"]], trainer=["trainer"], hang_up=signal.SIG_IGN)
    run.wait_for("loader started", "trainer started tcp://127.0.0.1:7001")
    keeper = psutil.Process(run.pid).children()[0].pid
    for pid in (run.pid, keeper):
        os.kill(pid, signal.SIGHUP)
    os.kill(run.pid, signal.SIGINT)  # it comes after SIGHUP, which would have stopped the trainer with SIGTERM
    assert run.end()[0] == 5
    assert [event for event in run.events() if "SIG" in event] == ["trainer SIGINT", "loader SIGTERM"]


def test_a_trainer_that_does_not_stop_is_killed_at_the_second_signal(run: Run) -> None:
    run.start(loaders=[["loader", "7001"]], trainer=["stubborn_trainer"], trainer_grace_s=60.0)
    run.wait_for("loader started", "stubborn_trainer started")
    os.kill(run.pid, signal.SIGTERM)
    wait_until(lambda: run.process is not None and _has_read(run, b"passed on"), "the first signal has arrived")
    os.kill(run.pid, signal.SIGTERM)
    code, _, stderr = run.end()
    assert code == 128 + signal.SIGKILL
    assert "did not end in time and was killed" in stderr


def test_a_rank_that_was_killed_shows_in_the_exit_code(run: Run) -> None:
    """DeepSpeed's launcher ends with 256 - 9 then."""
    run.start(loaders=[["loader", "7001"]], trainer=["exit", "247"])
    assert run.end()[0] == 137


def test_a_trainer_that_does_not_stop_is_killed_after_its_grace(run: Run) -> None:
    run.start(loaders=[], trainer=["stubborn_trainer"], trainer_grace_s=0.3)
    run.wait_for("stubborn_trainer started")
    os.kill(run.pid, signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize("target", ["launcher", "keeper"])
def test_sigkill_leaves_nothing_behind(run: Run, target: str) -> None:
    run.start(loaders=[["loader", "7001", "daemon"]], trainer=["trainer"])
    run.wait_for("loader started", "trainer started tcp://127.0.0.1:7001", "stubborn started")
    assert len(run.left()) == 3
    pid = run.pid if target == "launcher" else psutil.Process(run.pid).children()[0].pid
    os.kill(pid, signal.SIGKILL)
    code, _, _ = run.end()
    assert code == (-signal.SIGKILL if target == "launcher" else 128 + signal.SIGKILL)
    wait_until(lambda: not run.left(), "nothing is left, nor the worker that made a session of its own")
    if target == "launcher":
        assert "trainer SIGTERM" in run.events(), "the keeper still stops in good order"


def test_ranks_run_while_the_loaders_prepare_and_are_told_the_addresses(run: Run) -> None:
    run.start(loaders=[["loader", "7001"], ["late_loader", "7002"]], trainer=["exit", "0"])
    code, _, stderr = run.end()
    assert code == 0, stderr
    assert "trainer started tcp://127.0.0.1:7001 tcp://127.0.0.1:7002" in run.events()


def test_ranks_that_are_killed_before_the_loaders_are_ready_end_the_run(run: Run) -> None:
    run.start(loaders=[["slow_loader"]], trainer=["killed_early"])
    code, _, stderr = run.end()
    assert code == 128 + signal.SIGKILL
    assert "deepspeed ended with exit code 137 before the loaders were ready: its processes cannot start here" in stderr
    assert "[rank] no room for a library\n" in stderr
    assert not run.left()


def test_what_a_rank_had_printed_is_shown_if_it_is_killed_before_it_begins(run: Run) -> None:
    run.start(loaders=[["late_loader", "7001"]], trainer=["killed_early", "late"])
    code, stdout, stderr = run.end()
    assert (code, stdout) == (128 + signal.SIGKILL, "")
    assert "[rank] no room for a library\n" in stderr


def test_a_rank_that_waits_ends_with_its_launcher(run: Run) -> None:
    run.start(loaders=[["slow_loader"]], trainer=["exit", "0"])
    run.wait_for("rank waits")
    wait_until(lambda: len(run.left()) == 2, "the loader runs, too")
    keeper = psutil.Process(run.pid).children()[0]
    loader, rank = sorted(keeper.children(), key=lambda one: "exit" in one.cmdline())
    for pid in (run.pid, keeper.pid):  # one of them would have ended the rest
        os.kill(pid, signal.SIGSTOP)
    for pid in (run.pid, keeper.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: rank.pid not in run.left(), f"rank {rank.pid} is gone")
    with suppress(psutil.NoSuchProcess):  # a loader that had not printed yet has nobody who would read it
        loader.kill()
    assert run.end()[0] == -signal.SIGKILL
    wait_until(lambda: not run.left(), "the loader is gone, too")


def test_a_loader_that_does_not_start_is_shown_and_no_trainer_runs(run: Run) -> None:
    run.start(loaders=[["loader", "7001"], ["broken_loader"]], trainer=["exit", "0"])
    code, stdout, stderr = run.end()
    assert code == 3
    assert stdout == ""
    message = stderr[stderr.index("[launch] loader 1 ended with exit code 3") :]
    assert "[launch]     loader-serve: demos/train.jsonl:7: not JSON\n" in message
    assert not any("trainer" in event for event in run.events())


def test_a_loader_that_is_not_ready_in_time_is_named_with_the_way_out(run: Run) -> None:
    run.start(loaders=[["slow_loader"]], trainer=["exit", "0"], of_loaders={"ready_deadline_s": 2.0})
    code, _, stderr = run.end()
    assert code == 1
    assert "loader 0 was not ready within 2 s: run loader-prepare first" in stderr
    assert "[launch]     still reading shard 1\n" in stderr
    assert not run.left()


def test_a_signal_while_loaders_start_stops_them(run: Run) -> None:
    run.start(loaders=[["slow_loader"]], trainer=["exit", "0"])
    wait_until(lambda: len(run.left()) == 2, "the loader and a rank run")
    run.wait_for("rank waits")
    os.kill(run.pid, signal.SIGTERM)
    code, stdout, stderr = run.end()
    assert code == 128 + signal.SIGTERM
    assert stdout == ""
    assert "[launch] SIGTERM while the loaders were starting" in stderr.splitlines()
    assert not run.left()


def test_sigusr1_to_every_process_makes_ranks_save_and_ends_no_other(run: Run) -> None:
    """As Slurm sends it before the time limit. A rank that has not begun to train ignores it, so it is passed on again."""
    run.start(loaders=[["loader", "7001"]], trainer=["launches"])
    run.wait_for("trainer started")
    for process in (psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)):
        process.send_signal(signal.SIGUSR1)
    code, _, stderr = run.end()
    assert code == 75
    assert stderr.count("SIGUSR1: passed on to the ranks") == 1
    assert run.events()[-3:] == ["asked 1", "asked 2", "loader SIGTERM"]


def test_sigusr1_while_loaders_start_ends_the_run_as_one_to_be_repeated(run: Run) -> None:
    run.start(loaders=[["slow_loader"]], trainer=["exit", "0"])
    wait_until(lambda: len(run.left()) == 2, "the loader and a rank run")
    os.kill(run.pid, signal.SIGUSR1)
    code, _, stderr = run.end()
    assert code == 75
    assert "SIGUSR1 while the loaders were starting" in stderr


def test_a_loader_that_dies_is_restarted_on_its_address(run: Run) -> None:
    address = "tcp://127.0.0.1:7002"
    run.start(
        loaders=[["loader", "7001"], ["mortal_loader", "7002"]],
        trainer=["awaits", f"mortal_loader restarted {address}"],
    )
    code, _, stderr = run.end()
    assert code == 0
    assert f"loader 1 ({address}) died with exit code 137 and is restarted in 0.1 s, restart 1 of 10; 1 left" in stderr
    assert "[launch]     about to crash\n" in stderr
    assert run.events().count("mortal_loader SIGTERM") == 1, "the restarted one was asked to drain at the end"


def test_restarts_are_bounded_and_training_goes_on_without_the_loader(run: Run) -> None:
    run.start(
        loaders=[["loader", "7001"], ["mortal_loader", "7002", "always"]],
        trainer=["outlives_a_loader", "3"],
        of_loaders={"max_restarts": 2},
    )
    code, _, stderr = run.end()
    assert code == 0
    assert "restart 1 of 2; 1 left" in stderr
    assert "restart 2 of 2; 1 left" in stderr
    assert (
        "loader 1 (tcp://127.0.0.1:7002) died with exit code 137 and is not restarted: its 2 restarts are used up "
        "(--loader-restarts); 1 left"
    ) in stderr


def test_the_last_loader_s_end_names_the_deadline_that_follows(run: Run) -> None:
    run.start(loaders=[["mortal_loader", "7002"]], trainer=["outlives_a_loader", "1"], of_loaders={"max_restarts": 0})
    code, _, stderr = run.end()
    assert code == 0
    assert "its 0 restarts are used up (--loader-restarts); none is left, and the trainer ends by " in stderr


def test_a_loader_that_was_told_to_stop_is_not_restarted(run: Run) -> None:
    run.start(loaders=[["loader", "7001"], ["polite_loader", "7002"]], trainer=["outlives_a_loader", "1"])
    code, _, stderr = run.end()
    assert code == 0
    assert (
        "died with exit code 0 and is not restarted, for exit code 0 means that it was told to stop; 1 left" in stderr
    )


def test_a_restarted_loader_that_is_not_ready_in_time_is_killed_and_counted(run: Run) -> None:
    run.start(
        loaders=[["restarts_slowly", "7002"]],
        trainer=["trainer"],
        of_loaders={"ready_deadline_s": 3.0, "max_restarts": 2},
    )
    wait_until(lambda: run.events().count("restarted") == 2, "the second restart")
    os.kill(run.pid, signal.SIGTERM)
    code, _, stderr = run.end()
    assert code == 5
    assert "loader 0 was not ready 3 s after its restart: killed" in stderr
    assert "restart 2 of 2; 0 left" in stderr


@pytest.mark.parametrize("written", [[], ['{"steps": 1']], ids=["nothing", "half of it"])
@pytest.mark.parametrize("earlier", [None, '{"steps": 1}'], ids=["new", "complete before"])
def test_exit_code_0_without_the_record_of_a_complete_run_is_no_success(
    run: Run, written: list[str], earlier: str | None
) -> None:
    record = run.folder / "summary.json"
    if earlier is not None:
        record.write_text(earlier)
    run.start(loaders=[], trainer=["is_killed", *written])
    code, _, stderr = run.end()
    assert code == 1
    assert f"deepspeed ended with exit code 0, but the trainer did not write {record}, so the run is not" in stderr


def test_a_run_that_was_complete_before_and_writes_its_record_again_is_a_success(run: Run) -> None:
    (run.folder / "summary.json").write_text('{"steps": 1}')
    run.start(loaders=[], trainer=["exit", "0"])
    assert run.end()[0] == 0


def test_ranks_that_outlive_deepspeed_are_ended_and_are_no_success(run: Run) -> None:
    run.start(loaders=[], trainer=["leaves_ranks"], left_over_s=0.3)
    code, _, stderr = run.end()
    assert code == 1
    assert "left 1 processes" in stderr
    assert not run.left()


def _has_read(run: Run, text: bytes) -> bool:
    """Whether the launcher has said `text`; what is read here is lost for `end`."""
    assert run.process is not None
    assert run.process.stderr is not None
    descriptor = run.process.stderr.fileno()
    os.set_blocking(descriptor, False)
    try:
        return text in os.read(descriptor, 65536)
    except BlockingIOError:
        return False
    finally:
        os.set_blocking(descriptor, True)
