"""A disk that is full at a list of steps does not end a run: what it has trained since its last checkpoint would be lost."""

from __future__ import annotations

import errno
import json
import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker_proto.run_record import log_file
from trainer.feed.digest_log import DigestLog
from trainer.report import loss_spikes
from trainer.report.loss_spikes import WARM_UP, WorstSteps


def batch(first_sample: int) -> Any:
    return SimpleNamespace(epoch=0, first_sample=first_sample, micro_batches=[])


class Disk:
    """A raw file whose disk has room for so many bytes."""

    def __init__(self, path: Path, room: int) -> None:
        self._file = path.open("ab", buffering=0)
        self.room = room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self._file.close()


def test_the_list_of_digests_goes_on_when_there_is_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = DigestLog(tmp_path, 0, "r")
    path = log_file(tmp_path, 0)
    log.add(1, batch(0), 1.0)
    size = path.stat().st_size
    with closing(log):
        log._file.close()
        disk = Disk(path, size + size // 2)
        log._file = disk  # type: ignore[assignment]
        for step in (2, 3, 4):
            log.add(step, batch(8 * step), 1.0)
        disk.room = 1 << 20
        log.add(5, batch(40), 1.0)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [1, 2, 5]
    assert len(lines) == 4, "one was cut short, and nothing is written behind it"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        f"{path} cannot be written (the disk is full): batches of such steps cannot be made again from it",
        f"{path} lacks 2 steps, for which there was no room",
    ]


def test_a_run_that_was_killed_while_it_wrote_leaves_a_line_of_its_own(tmp_path: Path) -> None:
    log_file(tmp_path, 0).write_text('{"step": 1, "epo')
    with closing(DigestLog(tmp_path, 0, "r")) as log:
        log.add(1, batch(0), 1.0)
        log.add(2, batch(8), 1.0)
    first, *others = log_file(tmp_path, 0).read_text().splitlines()
    assert first == '{"step": 1, "epo'
    assert [json.loads(line)["step"] for line in others] == [1, 2]


def test_the_worst_steps_are_kept_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    worst = WorstSteps(tmp_path, 0, "r", keep=4, done=0)
    for step in range(1, WARM_UP + 1):
        worst.add(step, 1.0, [[1.0]])
    with monkeypatch.context() as patch:
        patch.setattr(loss_spikes, "write_worst", full)
        worst.add(10, 5.0, [[5.0]])
    assert "step 10: the worst steps cannot be written: [Errno 28] No space left on device" in caplog.text
    worst.add(11, 9.0, [[9.0]])
    assert [step.step for step in loss_spikes.read_worst(tmp_path, 0)] == [11, 10]
