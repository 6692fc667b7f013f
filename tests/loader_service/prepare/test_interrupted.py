"""A `loader-prepare` that is killed leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_service.prepare import scan_pool

pytestmark = pytest.mark.process

SLOW = """
import os
import time
from loader_service.sources.base import BaseSFTDataset, ScannedRecord

class Slow(BaseSFTDataset):
    shard_patterns = ("*.txt",)

    def scan(self, shard):
        shard.with_suffix(".part").write_text(str(os.getpid()))
        shard.with_suffix(".part").rename(shard.with_suffix(".pid"))
        time.sleep(300)
        yield ScannedRecord(offset=0, size=1, num_samples=1)

    def read(self, shard, offset, size):
        raise NotImplementedError
"""
CONFIG = """
model: {{base_model_path: unused}}
data: {{dataset_type: 'slow_scan:Slow', train_data_paths: [{data}], max_seq_len: 64}}
trainer: {{micro_batch_size: 1, global_batch_size: 1, lr: 2e-5}}
"""


def is_running(process: int) -> bool:
    """Whether it runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_scanning_processes_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "slow_scan.py").write_text(SLOW)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.txt", "b.txt"):
        (data / name).touch()
        os.truncate(data / name, scan_pool.MIN_POOL_BYTES // 2 + 1)  # without blocks on the disk
    (tmp_path / "config.yaml").write_text(CONFIG.format(data=data))
    root = Path(scan_pool.__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (tmp_path, root, root / "proto")))
    process = subprocess.Popen(
        [sys.executable, "-m", "loader_service.cli", "prepare", "--config", "config.yaml", "--processes", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: len(list(data.glob("*.pid"))) == 2, 120), "nobody scans"
        workers = [int(file.read_text()) for file in data.glob("*.pid")]
        assert process.pid not in workers
        process.send_signal(number)
        assert process.wait(60) == -number  # 128 + number in a shell
        assert wait_for(lambda: not any(map(is_running, workers)), 60), "scanning processes are left"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is empty, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
