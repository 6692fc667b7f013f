"""What watches the tests' processes is itself watched at work, in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from tests.support import started

started.GRACE_S = 0.3

def pytest_configure(config):
    config.addinivalue_line("markers", "process: starts processes")
    config.pluginmanager.register(started.Started())
"""
TESTS = """
import multiprocessing, subprocess, sys
import pytest

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]

@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()

@pytest.fixture(scope="module")
def careless():
    return subprocess.Popen(SLEEP)

@pytest.mark.process
def test_leaves_a_child(server):
    test_leaves_a_child.kept = subprocess.Popen(SLEEP)

@pytest.mark.process
def test_leaves_an_orphan():
    subprocess.run(["sh", "-c", "sleep 300 &"], check=True)

@pytest.mark.process
def test_leaves_a_fork():
    test_leaves_a_fork.kept = multiprocessing.get_context("fork").Process(target=__import__("time").sleep, args=(300,))
    test_leaves_a_fork.kept.start()

def test_starts_without_the_mark():
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)

def test_spawns_without_the_mark():
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()

def test_shares_without_the_mark(server):
    assert server.poll() is None

@pytest.mark.process
def test_shares(server):
    assert server.poll() is None

def test_starts_nothing():
    pass

@pytest.mark.process
def test_is_last(careless):
    assert careless.poll() is None
"""


@pytest.mark.process
def test_what_is_left_and_what_is_not_marked_is_named(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_inner.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rE", "-p", "no:cacheprovider", "test_inner.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(r"\n9 passed, 7 errors in ", done.stdout), done.stdout + done.stderr
    said = dict(re.findall(r"^ERROR test_inner\.py::(\w+) - Failed: (.*)$", done.stdout, re.MULTILINE))
    for name in ("test_leaves_a_child", "test_leaves_an_orphan", "test_leaves_a_fork"):
        assert said.pop(name).startswith(f"test_inner.py::{name} leaves process ")
    assert said.pop("test_is_last").startswith("fixture 'careless' of test_inner.py leaves process ")
    for name in ("test_starts_without_the_mark", "test_spawns_without_the_mark", "test_shares_without_the_mark"):
        assert said.pop(name).startswith("not marked `process`, but it starts processes: ")
    assert said == {}


@pytest.mark.process
def test_children_can_be_interrupted_where_pytest_was_started_with_sigint_ignored() -> None:
    child = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"]
    program = f"import tests.conftest, subprocess; print(subprocess.run({child!r}, stderr=-3).returncode)"
    done = subprocess.run(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "-2\n"
