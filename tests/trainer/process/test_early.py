"""A rank that starts before the loaders are ready is silent until the launcher says that they are."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from stoker_proto.host.start import Start, StartSender

ROOT = Path(__file__).parents[3]
RANK = """
import os, sys
from stoker_proto.errors import ConfigError
from trainer.process import early
from trainer.process.early import prepare_and_wait

early._KEEP_ERROR_S = 0.1

def prepare():
    print("from python", flush=True)
    os.system("echo from a library; echo warning >&2")
    if sys.argv[1] == "fails":
        raise ConfigError("no such model")
    if sys.argv[1] == "exits":
        sys.exit("a library ends the process")
    if sys.argv[1] == "crashes":
        os.write(2, b"Illegal instruction\\n")
        os.abort()

try:
    start = prepare_and_wait(prepare, 60.0)
except ConfigError as error:
    sys.exit(f"error: {error}")
print(start.master_port)
"""


def rank(prepared: str, sender: StartSender) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, prepared],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        stdin=sender.for_ranks.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("prepared", "is_told", "code", "stdout", "stderr"),
    [
        ("well", True, 0, "from python\nfrom a library\n4242\n", "warning\n"),
        ("fails", True, 1, "from python\nfrom a library\n", "warning\nerror: no such model\n"),
        ("exits", True, 1, "from python\nfrom a library\n", "warning\na library ends the process\n"),
        ("well", False, 1, "", ""),
        ("fails", False, 1, "", ""),
    ],
)
def test_output_and_errors_are_kept_until_the_run_begins(
    prepared: str, is_told: bool, code: int, stdout: str, stderr: str
) -> None:
    sender = StartSender()
    process = rank(prepared, sender)
    if is_told:
        sender.send(Start(loader_addresses=("tcp://127.0.0.1:7001",), master_port=4242))
    sender.close()
    assert process.communicate(timeout=60) == (stdout, stderr)
    assert process.returncode == code


@pytest.mark.process
def test_while_loaders_prepare_for_long_an_error_is_told_and_a_crash_leaves_what_was_printed() -> None:
    with closing(StartSender()) as sender:
        process = rank("fails", sender)
        assert process.communicate(timeout=60) == ("from python\nfrom a library\n", "warning\nerror: no such model\n")
        assert process.returncode == 1
        assert sender.held_output() == [], "it was shown"
        process = rank("crashes", sender)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == -signal.SIGABRT
        assert sender.held_output() == [b"from python\nfrom a library\n", b"warning\nIllegal instruction\n"]
