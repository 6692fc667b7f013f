"""File systems that know no time-out (sftp, smb) hold nobody up for longer than the deadline."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from loader_service.remote import filesystem
from loader_service.remote import timed_call as patience
from loader_service.remote.store import RemoteStore
from loader_service.remote.timed_call import MAX_LEFT, call_within
from loader_service.remote.url import parse_url
from stoker_proto.errors import FetchError
from tests.end_to_end.fleet import wait_until
from tests.support.slowness import slowness

MakeStore = Callable[..., RemoteStore]


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs waits for this."""
    event = threading.Event()
    yield event
    event.set()
    wait_until(lambda: not patience._left, 60, "the end of all calls")


def test_the_import_of_a_file_system_does_not_count_against_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_library.py").write_text(
        "from fsspec.implementations.local import LocalFileSystem\n\n\n"
        "class Large(LocalFileSystem):\n    protocol = 'large'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fsspec.register_implementation("large", "large_library.Large", clobber=True)
    imported: list[bool] = []

    def call(deadline_s: float, function: Callable[[], object]) -> object:
        imported.append("large_library" in sys.modules)
        return call_within(deadline_s, function)

    monkeypatch.setattr(filesystem, "call_within", call)
    try:
        filesystem.RemoteFiles("large", {}, 60)
    finally:
        sys.modules.pop("large_library", None)
    assert imported == [True], "when the clock starts"


@pytest.mark.long
def test_a_file_system_that_hangs_is_given_up(make_store: MakeStore, tmp_path: Path, released: threading.Event) -> None:
    url = f"file://{tmp_path}/data"
    store = make_store(url, deadline_s=1)
    system = store.files(parse_url(url))._fs
    whole = system.cat_file
    system.cat_file = lambda *arguments, **keywords: released.wait(600) and whole(*arguments, **keywords)
    path = store.path_of(f"{url}/a.bin")
    started = time.monotonic()
    with store.pins.reading(), pytest.raises(FetchError, match=r"a\.bin: no answer in time \(\d attempts? in 1 s\)"):
        store.local(str(path))
    assert time.monotonic() - started < 10 * slowness()
    assert not path.exists()
    system.cat_file = whole
    with store.pins.reading():
        store.local(str(path))
        assert path.read_bytes() == b"a" * 1000


def test_a_log_in_that_hangs_is_given_up(
    make_store: MakeStore, tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/data"
    monkeypatch.setattr(filesystem, "_open", lambda *_: released.wait(600))
    with pytest.raises(FetchError, match=r"file:// in the data paths: no connection in 0\.2 s"):
        make_store(url, deadline_s=0.2).files(parse_url(url))


def test_files_come_in_blocks_or_whole(make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/data"
    monkeypatch.setattr(filesystem, "BLOCK_BYTES", 300)
    (tmp_path / "data" / "d.bin").write_bytes(bytes(range(250)) * 4)
    store = make_store(url)
    assert Path(store.local(str(store.path_of(f"{url}/d.bin")))).read_bytes() == bytes(range(250)) * 4
    system = store.files(parse_url(url))._fs
    whole = system.cat_file
    system.cat_file = lambda path, **_: whole(path)  # knows no ranges
    (tmp_path / "data" / "e.bin").write_bytes(bytes(range(250)) * 4)
    assert Path(store.local(str(store.path_of(f"{url}/e.bin")))).read_bytes() == bytes(range(250)) * 4


def test_calls_that_hang_do_not_pile_up(released: threading.Event) -> None:
    for _ in range(MAX_LEFT):
        with pytest.raises(TimeoutError):
            call_within(0.001, lambda: released.wait(600))
    with pytest.raises(FetchError, match="64 calls of file systems that know no time-out hang"):
        call_within(10, lambda: 1)
    released.set()
    wait_until(lambda: not patience._left, 60, "the end of all calls")
    assert call_within(10, lambda: 1) == 1


def test_errors_are_those_of_the_call() -> None:
    with pytest.raises(ZeroDivisionError):
        call_within(10, lambda: 1 // 0)
