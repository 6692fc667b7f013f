"""A child process ends with its parent, also when the parent is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stoker_proto.host import process

PROTO = Path(process.__file__).parents[2]
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(120)
"""
CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from stoker_proto.host.process import end_with_parent
print(end_with_parent(os.getppid()), flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.process
def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(PROTO)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    number, answer = parent.stdout.readline().split()
    assert answer == "True"
    child = psutil.Process(int(number))
    assert child.is_running()
    parent.kill()
    parent.wait(20)
    parent.stdout.close()
    end = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.process
def test_a_parent_that_is_gone_already_is_noticed() -> None:
    code = f"import sys; sys.path.insert(0, {str(PROTO)!r}); from stoker_proto.host.process import end_with_parent"
    check = f"{code}; sys.exit(0 if not end_with_parent({os.getpid()} + 1) else 1)"  # not this process: it is gone
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
