"""A rank that starts before the loaders are ready is silent until the launcher says that they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stoker_proto.host.start import Start, StartSender

ROOT = Path(__file__).parents[3]
RANK = """
import os, sys
from stoker_proto.errors import ConfigError
from trainer.process.early import prepare_and_wait

def prepare():
    print("from python", flush=True)
    os.system("echo from a library; echo warning >&2")
    if sys.argv[1] == "fails":
        raise ConfigError("no such model")

try:
    start = prepare_and_wait(prepare, 60.0)
except ConfigError as error:
    sys.exit(f"error: {error}")
print(start.master_port)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("prepared", "is_told", "code", "stdout", "stderr"),
    [
        ("well", True, 0, "from python\nfrom a library\n4242\n", "warning\n"),
        ("fails", True, 1, "from python\nfrom a library\n", "warning\nerror: no such model\n"),
        ("well", False, 1, "", ""),
        ("fails", False, 1, "", ""),
    ],
)
def test_output_and_errors_are_kept_until_the_run_begins(
    prepared: str, is_told: bool, code: int, stdout: str, stderr: str
) -> None:
    sender = StartSender()
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, prepared],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        stdin=sender.for_ranks.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if is_told:
        sender.send(Start(loader_addresses=("tcp://127.0.0.1:7001",), master_port=4242))
    sender.close()
    assert process.communicate(timeout=60) == (stdout, stderr)
    assert process.returncode == code
