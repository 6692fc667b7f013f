"""No test leaves a process behind, and only tests that are marked `process` start one.

Each process that a test starts finds the test's name in its environment and hands it on to its own children, so that one that is
left is named with its test, whatever became of its parent. What a fixture of a module or of the session starts may live as long
as that fixture.
"""

from __future__ import annotations

import _posixsubprocess
import contextlib
import os
import subprocess  # it must have its own fork_exec before that is wrapped here
import sys
import time
from collections.abc import Generator
from multiprocessing import resource_tracker
from typing import Any

import psutil
import pytest

STARTED_BY = "STOKER_TEST_PROCESS_OF"
"""`SESSION OWNER`: of this pytest process, and the test or fixture that started it."""
GRACE_S = 60.0
"""For processes that are about to end when their test is over."""
_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


class Started:
    """A pytest plugin."""

    def __init__(self) -> None:
        self._session = f"{os.getpid()}-{time.time_ns()}"
        self._pid = os.getpid()
        self._starts: list[str] = []  # by whatever runs now
        self._alive: set[str] = set()  # fixtures of more than one test
        self._starters: set[str] = set()  # those of them that start processes
        self._theirs: set[psutil.Process] = set()  # forked by them: without a name in the environment
        sys.addaudithook(self._audit)
        real = _posixsubprocess.fork_exec

        def fork_exec(*arguments: Any) -> int:
            self._starts.append("multiprocessing spawns one")
            return real(*arguments)

        assert subprocess._fork_exec is real  # type: ignore[attr-defined]
        _posixsubprocess.fork_exec = fork_exec  # multiprocessing's "spawn" has no audit event

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and os.getpid() == self._pid:
            self._starts.append(f"{event}{arguments[:2]!r:.200}")

    @contextlib.contextmanager
    def _as(self, owner: str) -> Generator[None]:
        before = os.environ.get(STARTED_BY)
        os.environ[STARTED_BY] = f"{self._session} {owner}"
        try:
            yield
        finally:
            if before is None:
                del os.environ[STARTED_BY]
            else:
                os.environ[STARTED_BY] = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._starts.clear()
        with self._as(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        owner = _owner(fixturedef)
        known, forked = len(self._starts), self._children()
        self._alive.add(owner)
        with self._as(owner):
            try:
                return (yield)
            finally:
                if len(self._starts) > known:
                    self._starters.add(owner)
                    self._theirs |= self._children() - forked

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        self._alive.discard(_owner(fixturedef))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if self._starts and (left := self._left_after(GRACE_S)):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # it would disturb the tests that follow
            pytest.fail("\n".join(left.values()), pytrace=False)
        if not item.get_closest_marker("process") and (what := self._starts_for(item)):
            pytest.fail(f"not marked `process`, but it starts processes: {', '.join(what)}", pytrace=False)
        return result

    def _starts_for(self, item: pytest.Item) -> list[str]:
        """What the test itself started, and its fixtures that started something, perhaps for an earlier test."""
        fixtures: dict[str, Any] = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
        owners = {_owner(definition) for definitions in fixtures.values() for definition in definitions}
        return self._starts + sorted(self._starters & owners)

    def _left_after(self, grace_s: float) -> dict[psutil.Process, str]:
        end = time.monotonic() + grace_s
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    def _left(self) -> dict[psutil.Process, str]:
        """Each running process that no living fixture started, and who left it."""
        children, found = self._children(), {}
        for process in psutil.process_iter():
            if process.pid in (self._pid, _bookkeeper()):
                continue
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                session, _, owner = process.environ().get(STARTED_BY, "").partition(" ")
                if session != self._session:
                    if process not in children or process in self._theirs:
                        continue
                    owner = os.environ[STARTED_BY].partition(" ")[2]
                if owner not in self._alive and process.status() != psutil.STATUS_ZOMBIE:
                    words = " ".join(process.cmdline())[:200]
                    found[process] = f"{owner} leaves process {process.pid}, which is ended now: {words}"
        return found

    def _children(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))


def _bookkeeper() -> int | None:
    """multiprocessing's, which lives as long as pytest."""
    pid: int | None = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    return pid


def _owner(fixturedef: pytest.FixtureDef[Any]) -> str:
    return f"fixture '{fixturedef.argname}' of {fixturedef.baseid or 'tests'}"
