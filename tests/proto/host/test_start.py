"""Ranks that share their stdin all hear from the launcher, and none waits for one that is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stoker_proto.host.start import Start, StartSender

PROTO = Path(__file__).parents[3] / "proto"
RANK = f"""
import sys
sys.path.insert(0, {str(PROTO)!r})
from stoker_proto.errors import DeadlineError
from stoker_proto.host.start import wait_start
try:
    start = wait_start(float(sys.argv[1]))
except DeadlineError as error:
    sys.exit(str(error))
print(start and (start.loader_addresses, start.master_port), repr(sys.stdin.read()))
"""
pytestmark = pytest.mark.process


def rank(sender: StartSender, deadline_s: float = 60.0) -> subprocess.Popen[str]:
    """A process that prints what it was told, and what it then finds on stdin."""
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(deadline_s)],
        stdin=sender.for_ranks.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_rank_sees_the_message_whenever_it_looks() -> None:
    sender = StartSender()
    early = [rank(sender), rank(sender)]
    sender.send(Start(loader_addresses=("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002"), master_port=4242))
    late = rank(sender)
    sender.close()
    for one in (*early, late):
        assert one.communicate(timeout=60) == ("(('tcp://127.0.0.1:7001', 'tcp://127.0.0.1:7002'), 4242) ''\n", "")


def test_a_launcher_that_gives_up_or_says_nothing() -> None:
    sender, silent = StartSender(), StartSender()
    given_up, waits = rank(sender), rank(silent, 0.1)
    sender.close()
    assert given_up.communicate(timeout=60) == ("None ''\n", "")
    assert waits.communicate(timeout=60) == (
        "",
        "the launcher has not said within 0.1 s that the loaders are ready: start the run again\n",
    )
    assert waits.returncode == 1
    silent.close()
