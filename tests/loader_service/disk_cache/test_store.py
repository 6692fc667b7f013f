"""Records on disk: found by later processes, never wrong, within the limit, and no trouble of the disk reaches the caller."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loader_service.disk_cache import eviction
from loader_service.disk_cache import store as store_module
from loader_service.disk_cache.segment import INDEX, RECORDS
from loader_service.disk_cache.store import DiskCache
from tests.end_to_end.fleet import environment, wait_until
from tests.loader_service.disk_cache import appending
from tests.loader_service.disk_cache.appending import key_of, record_of

LIMIT = 64 << 20
SMALL = 4 << 20
"""Sixteen segments of 256 KiB."""


def filled(folder: Path, numbers: range, limit: int = LIMIT) -> DiskCache:
    cache = DiskCache(folder, limit)
    for number in numbers:
        cache.put(key_of(number), record_of(number))
    return cache


def found_in(cache: DiskCache, numbers: range) -> list[int]:
    """The records that are there; each must be as it was written."""
    found = []
    for number in numbers:
        data = cache.get(key_of(number))
        if data is not None:
            assert data == record_of(number)
            found.append(number)
    return found


def disk_bytes(folder: Path) -> int:
    """What the folder takes; other processes may remove files meanwhile."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def age(file: Path, seconds: float) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_later_process_finds_every_record_and_another_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOOK_EVERY_S", 0.0)
    beside = DiskCache(tmp_path / "not yet" / "there", LIMIT)
    cache = filled(tmp_path / "not yet" / "there", range(50))
    assert found_in(cache, range(52)) == found_in(beside, range(52)) == list(range(50))
    cache.close()
    later = DiskCache(tmp_path / "not yet" / "there", LIMIT)
    assert found_in(later, range(52)) == list(range(50))
    counters = later.counters
    assert (counters.hits, counters.misses, counters.damaged, counters.written_bytes) == (50, 2, 0, 0)
    assert counters.read_bytes == sum(len(record_of(number)) for number in range(50)) == cache.counters.written_bytes
    later.put(key_of(3), record_of(3))
    assert later.counters.written_bytes == 0, "it was there"


@pytest.mark.parametrize(
    "damage", ["a bit of a record", "records cut short", "a bit of an entry", "no records", "head"]
)
def test_what_is_damaged_is_a_miss_counted_said_once_and_kept_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, range(20)).close()
    (records,), (index,) = tmp_path.glob(f"*{RECORDS}"), tmp_path.glob(f"*{INDEX}")
    at = sum(len(record_of(number)) for number in range(7)) + 5
    if damage == "a bit of a record":
        flip(records, at)
    elif damage == "records cut short":
        os.truncate(records, at)
    elif damage == "a bit of an entry":
        flip(index, 16 + 7 * 40 + 3)  # its key: without a checksum nobody would miss it
    elif damage == "head":
        flip(index, 3)
    else:
        records.unlink()
    lost = {"records cut short": list(range(7, 20)), "no records": list(range(20)), "head": list(range(20))}
    lost_here = lost.get(damage, [7])
    cache = DiskCache(tmp_path, LIMIT)
    assert found_in(cache, range(20)) == [number for number in range(20) if number not in lost_here]
    assert cache.counters.misses == len(lost_here)
    counted = {"no records": 0, "head": 1}.get(damage, len(lost_here))  # without its file a segment was evicted
    assert cache.counters.damaged == counted
    assert len(warnings_in(caplog)) == bool(counted)
    for number in lost_here:
        cache.put(key_of(number), record_of(number))
    assert found_in(cache, range(20)) == list(range(20))
    cache.close()
    assert found_in(DiskCache(tmp_path, LIMIT), range(20)) == list(range(20)), "the newer copy wins"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def test_a_writer_that_stopped_at_any_byte_leaves_whole_records_only(tmp_path: Path) -> None:
    filled(tmp_path / "whole", range(3)).close()
    (records,), (index,) = (tmp_path / "whole").glob(f"*{RECORDS}"), (tmp_path / "whole").glob(f"*{INDEX}")
    ends = [sum(len(record_of(n)) for n in range(count)) for count in range(4)]
    states = [(ends[2] + size, 2) for size in range(0, len(record_of(2)), 997)]  # a record was being written
    for folder, (record_bytes, index_entries, index_rest) in enumerate(
        [(size, count, 0) for size, count in states] + [(ends[3], 2, rest) for rest in range(40)] + [(0, 0, -1)]
    ):
        copy = tmp_path / str(folder)
        shutil.copytree(tmp_path / "whole", copy)
        os.truncate(copy / records.name, record_bytes)
        os.truncate(copy / index.name, 16 + 40 * index_entries + index_rest)
        cache = DiskCache(copy, LIMIT)
        assert found_in(cache, range(3)) == list(range(index_entries))
        assert cache.counters.damaged == 0, "a killed process is no damage"
        shutil.rmtree(copy)


def test_the_limit_holds_and_the_segments_used_longest_ago_go(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(100), SMALL)
    cache.close()
    old = sorted(tmp_path.glob(f"*{RECORDS}"))
    assert len(old) > 4
    for number, file in enumerate(old):
        for kind in (file, file.with_suffix(INDEX)):
            age(kind, 3600 * (len(old) - number))
    reader = DiskCache(tmp_path, SMALL)
    first = found_in(reader, range(3))  # the oldest segment is used again
    assert first == [0, 1, 2]
    writer = DiskCache(tmp_path, SMALL)
    most = 0
    for number in range(1000, 1000 + 2 * SMALL // (20 << 10)):
        writer.put(key_of(number), record_of(number))
        most = max(most, disk_bytes(tmp_path))
        if not old[1].exists():
            assert old[0].exists() or not any(file.exists() for file in old)
    assert SMALL * 0.8 < most <= SMALL
    assert not any(file.exists() for file in old[1:])
    assert found_in(reader, range(100)) == [], "what was evicted is a miss"
    assert reader.counters.damaged == 0
    DiskCache(tmp_path, SMALL // 4)
    writer.close()
    DiskCache(tmp_path, SMALL // 4)
    assert disk_bytes(tmp_path) <= SMALL // 4, "a lower limit removes at the start"


def test_a_segment_that_is_closed_while_it_is_counted_counts_with_its_last_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, is_locked = filled(tmp_path, range(1)), eviction._is_locked

    def closed_meanwhile(file: Path) -> bool:
        for number in range(1, 5):
            writer.put(key_of(number), record_of(number))
        writer.close()
        return is_locked(file)

    monkeypatch.setattr(eviction, "_is_locked", closed_meanwhile)
    [segment] = eviction.list_segments(tmp_path)
    assert not segment.is_written
    assert segment.size_bytes == disk_bytes(tmp_path)


def test_what_others_are_writing_is_not_removed_and_counts_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 1 << 20  # four segments
    writers = [filled(tmp_path, range(number, number + 1), limit) for number in range(4)]
    fifth = filled(tmp_path, range(10, 20), limit)
    assert fifth.counters.written_bytes == 0
    assert len(warnings_in(caplog)) == 1
    assert "all of loader.disk_cache_gb is being written by other processes" in warnings_in(caplog)[0]
    assert [found_in(writer, range(number, number + 1)) for number, writer in enumerate(writers)] == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_small_and_very_large_records_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, SMALL)
    cache.put(key_of(0), b"x" * 255)
    for _ in range(2):
        cache.put(key_of(1), b"x" * (256 << 10))
    assert not list(tmp_path.glob(f"*{RECORDS}"))
    assert len(warnings_in(caplog)) == 1
    assert "is too large for it: raise loader.disk_cache_gb" in warnings_in(caplog)[0]


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """The operating system refuses to write more bytes than this into any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more_stops_the_writing_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with no_room_beyond(100_000):
        cache = filled(tmp_path, range(30))
    kept = found_in(cache, range(30))
    assert 2 <= len(kept) < 29
    assert kept == list(range(len(kept)))
    assert len(warnings_in(caplog)) == 1
    assert "it cannot be written (File too large): nothing more is kept until this loader is started" in caplog.text
    (records,) = tmp_path.glob(f"*{RECORDS}")
    assert records.stat().st_size == sum(len(record_of(number)) for number in kept), "no part of a record is left"
    assert found_in(DiskCache(tmp_path, LIMIT), range(30)) == kept


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")
def test_a_full_file_system(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("this root may not mount a tmpfs")
    try:
        cache = filled(tmp_path, range(60))
        kept = found_in(cache, range(60))
        assert kept == list(range(len(kept)))
        assert 5 < len(kept) < 60
        assert "it cannot be written (No space left on device)" in caplog.text
        assert len(warnings_in(caplog)) == 1
        cache.close()
        assert found_in(DiskCache(tmp_path, LIMIT), range(60)) == kept
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = filled(tmp_path / "file" / "cache", range(5))
    assert found_in(cache, range(5)) == []
    assert len([text for text in warnings_in(caplog) if "it cannot be written (Not a directory)" in text]) == 1


def test_a_folder_that_somebody_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_LOOK_EVERY_S", 0.0)
    cache = filled(tmp_path / "cache", range(5))
    shutil.rmtree(tmp_path / "cache")
    assert found_in(cache, range(5)) == []
    for number in range(5, 9):
        cache.put(key_of(number), record_of(number))
    assert found_in(DiskCache(tmp_path / "cache", LIMIT), range(9)) == [5, 6, 7, 8]


@pytest.mark.process
def test_processes_that_write_at_once_and_are_killed(tmp_path: Path) -> None:
    """Three write until they are killed, within a limit that two of them would fill many times over."""
    command = [sys.executable, appending.__file__, str(tmp_path / "cache"), str(SMALL)]
    logs = [tmp_path / f"{first}.log" for first in range(3)]
    processes = []
    for first, log in enumerate(logs):
        with log.open("w") as out:
            processes.append(
                subprocess.Popen([*command, str(first), "3"], stdout=out, stderr=subprocess.STDOUT, env=environment())
            )
    try:
        for log, least in zip(logs, (50, 120, 400), strict=True):
            wait_until(lambda log=log, least=least: log.read_text().count("\n") >= least, 120, f"{least} records")
            processes[logs.index(log)].kill()
            assert disk_bytes(tmp_path / "cache") <= SMALL
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    numbers = range(max(int(line) for log in logs for line in log.read_text().splitlines() if line.isdigit()) + 6)
    cache = DiskCache(tmp_path / "cache", SMALL)
    found = found_in(cache, numbers)  # each one as it was written
    assert len(found) > 50
    assert cache.counters.damaged == 0
    last = max(logs, key=lambda log: log.stat().st_mtime_ns)  # the others may have stood still, and theirs was evicted
    newest = int(last.read_text().split()[-2])
    assert newest in found, "what was said to be kept is there"
    filled(tmp_path / "cache", range(100_000, 100_500), SMALL)
    assert disk_bytes(tmp_path / "cache") <= SMALL
