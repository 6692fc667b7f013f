"""Copies: fetched once, whole, within the bound, and never taken from under a reader."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_service.remote import filesystem
from loader_service.remote.filesystem import FileInfo
from loader_service.remote.index import FILE, Index
from loader_service.remote.store import RemoteStore
from loader_service.remote.url import parse_url
from stoker_proto.errors import ConfigError, DataError, FetchError
from tests.end_to_end.fleet import environment, wait_until
from tests.loader_service.remote.http_files import HttpFiles

MakeStore = Callable[..., RemoteStore]


def local(store: RemoteStore, served: HttpFiles, name: str) -> Path:
    return Path(store.local(str(store.path_of(served.url_of(name)))))


def copies(store: RemoteStore) -> set[str]:
    """Names of the files that are here."""
    return {path.name for path in store.folder.rglob("*.bin")}


def test_a_file_is_fetched_once_whoever_asks(served: HttpFiles, make_store: MakeStore) -> None:
    stores = [make_store(), make_store()]
    threads = [threading.Thread(target=local, args=(stores[i % 2], served, "a.bin")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert local(make_store(), served, "a.bin").read_bytes() == b"a" * 1000
    assert served.gets == served.heads == {"a.bin": 1}
    assert stores[0].index.total_bytes() == 1000
    assert list((stores[0].folder / ".parts").iterdir()) == []


@pytest.mark.process
def test_two_processes_fetch_each_file_once(served: HttpFiles, make_store: MakeStore, tmp_path: Path) -> None:
    names = [f"{i}.bin" for i in range(20)]
    for name in names:
        (served.folder / name).write_bytes(name.encode() * 1000)
    program = (
        "import sys; from pathlib import Path; from loader_service.remote.store import RemoteStore\n"
        "from stoker_proto.config.remote import RemoteConfig\n"
        "store = RemoteStore(Path(sys.argv[1]), RemoteConfig(min_free_gb=0)); store.cover([sys.argv[2]])\n"
        "for i in range(20): store.local(str(store.path_of(f'{sys.argv[2]}{i}.bin')))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache" / "remote"), served.url_of()]
    processes = [subprocess.Popen(command, env=environment()) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert served.gets == dict.fromkeys(names, 1)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["500", "429", "short", "cut"])
def test_what_fails_now_and_then_is_tried_again(
    served: HttpFiles, make_store: MakeStore, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "BLOCK_BYTES", 300)
    served.faults["a.bin"] = [fault, fault]
    assert local(make_store(), served, "a.bin").read_bytes() == b"a" * 1000
    blocks = 4
    assert served.gets["a.bin"] <= blocks + 2 + 1  # what had come before the failure is not fetched again


def test_a_server_without_ranges_gives_the_file_whole(
    served: HttpFiles, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "BLOCK_BYTES", 300)
    served.ranges = False
    assert local(make_store(), served, "a.bin").read_bytes() == b"a" * 1000
    assert served.gets["a.bin"] == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", r"HTTP status 500.* attempts in 0\.5 s\): is it reachable from this host\?"),
        ("short", r"EOFError: 500 bytes came instead of 1000 \(\d+ attempts"),
        ("403", r"HTTP status 403 Forbidden: check the URL and the credentials in the environment of this process"),
    ],
)
def test_what_does_not_come_is_named(served: HttpFiles, make_store: MakeStore, fault: str, said: str) -> None:
    served.faults["a.bin"] = [fault] * 1000
    store = make_store(deadline_s=0.5)
    with pytest.raises(FetchError, match=rf"^{served.url_of('a.bin')}: {said}"):
        local(store, served, "a.bin")
    assert copies(store) == set()
    assert store.index.total_bytes() == 0


@pytest.mark.long
def test_a_server_that_hangs_is_given_up(served: HttpFiles, make_store: MakeStore) -> None:
    served.faults["a.bin"] = ["hang"] * 10
    with pytest.raises(FetchError, match=r"a\.bin: no answer in time"):
        local(make_store(deadline_s=1), served, "a.bin")


def test_a_server_that_is_not_there_is_given_up(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store("http://127.0.0.1:9/", deadline_s=0.3)
    with pytest.raises(FetchError, match=r"http://127\.0\.0\.1:9/a\.bin: .*Cannot connect"):
        store.local(str(store.path_of("http://127.0.0.1:9/a.bin")))


def test_a_missing_file_is_bad_data(served: HttpFiles, make_store: MakeStore) -> None:
    with pytest.raises(DataError, match=rf"^{served.url_of('no.bin')}: there is no such file"):
        local(make_store(), served, "no.bin")
    assert served.gets["no.bin"] == 1  # found missing, it is not asked for again


@pytest.mark.long
def test_a_hanging_fetch_holds_nobody_else_up(served: HttpFiles, make_store: MakeStore) -> None:
    """One slot for work: the thread that waits gives it away."""
    store, read = make_store(), threading.Event()
    store.pins.limit_work(1)
    served.faults["a.bin"] = ["hang"]

    def read_a() -> None:
        with store.pins.reading():
            assert local(store, served, "a.bin").read_bytes() == b"a" * 1000
            read.set()

    thread = threading.Thread(target=read_a)
    thread.start()
    wait_until(lambda: served.gets["a.bin"], 60, "the request that hangs")
    with store.pins.reading():
        assert local(store, served, "b.bin").read_bytes() == b"b" * 1000
        assert not read.is_set()
        served.released.set()  # and now it comes, too; but only one works at a time
        assert not read.wait(0.2)
    thread.join(60)
    assert read.is_set()


@pytest.mark.long
def test_the_oldest_give_way_and_what_is_read_stays(
    served: HttpFiles, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(cache_gb=2000e-9)
    with store.pins.reading():
        local(store, served, "a.bin")
    with store.pins.reading():
        local(store, served, "b.bin")
    with store.pins.reading():
        path = local(store, served, "b.bin")
        local(store, served, "sub/c.bin")
        assert copies(store) == {"b.bin", "c.bin"}
        assert store.index.total_bytes() == 1500
        with caplog.at_level(logging.WARNING):
            local(store, served, "a.bin")
        assert copies(store) == {"a.bin", "b.bin", "c.bin"}  # all of them are read
        assert "do not hold the files that are read at the same time: 2500 bytes are kept" in caplog.text
        assert path.read_bytes() == b"b" * 1000
    with store.pins.reading():
        local(store, served, "a.bin")
    (served.folder / "d.bin").write_bytes(b"d")
    local(store, served, "d.bin")
    assert store.index.total_bytes() <= 2000
    assert {path.name: path.stat().st_size for path in store.folder.rglob("*.bin")}.get("d.bin") == 1


@pytest.mark.long
def test_what_was_used_longest_ago_goes_first(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store(cache_gb=2100e-9)
    for name in ("a.bin", "b.bin", "sub/c.bin"):
        with store.pins.reading():
            local(store, served, name)
    assert copies(store) == {"b.bin", "c.bin"}


def test_another_processes_reader_is_left_alone_too(served: HttpFiles, make_store: MakeStore) -> None:
    reader, other = make_store(cache_gb=1e-6), make_store(cache_gb=1e-6)
    with reader.pins.reading():
        path = local(reader, served, "a.bin")
        local(other, served, "b.bin")
        assert path.exists()
    local(make_store(cache_gb=1e-6), served, "sub/c.bin")
    assert not path.exists()


def test_an_emptied_folder_is_removed(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store(cache_gb=1000e-9)
    with store.pins.reading():
        folder = local(store, served, "sub/c.bin").parent
    with store.pins.reading():
        local(store, served, "a.bin")
    assert not folder.exists()
    assert local(store, served, "sub/c.bin").read_bytes() == b"c" * 500


def test_the_disk_is_not_filled(served: HttpFiles, make_store: MakeStore) -> None:
    with pytest.raises(
        FetchError, match=r"no room in .* for a file of 1000 bytes: .*data\.remote\.min_free_gb leaves 1e\+09 GB alone"
    ):
        local(make_store(min_free_gb=1e9), served, "a.bin")


def test_a_changed_file_is_fetched_anew_when_it_is_looked_at_again(served: HttpFiles, make_store: MakeStore) -> None:
    path = local(make_store(), served, "a.bin")
    (served.folder / "a.bin").write_bytes(b"A" * 1000)
    assert local(make_store(), served, "a.bin").read_bytes() == b"a" * 1000
    assert served.heads["a.bin"] == 1
    old = path.stat().st_mtime - 25 * 3600
    os.utime(path, (old, old))
    assert local(make_store(), served, "a.bin").read_bytes() == b"A" * 1000
    os.utime(path, (old, old))
    local(make_store(), served, "a.bin")
    assert served.gets["a.bin"] == 2  # unchanged: its age begins anew, and nothing is fetched
    assert path.stat().st_mtime > old + 3600
    assert make_store(recheck_hours=0).local(str(path)) == str(path)


@pytest.mark.long
def test_a_fetch_that_fails_leaves_the_copy_from_before_under_no_version(
    served: HttpFiles, make_store: MakeStore
) -> None:
    """Else the old bytes would be taken for the new ones ever after."""
    store = make_store(recheck_hours=0, deadline_s=0.3)
    with store.pins.reading():
        local(store, served, "a.bin")
    (served.folder / "a.bin").write_bytes(b"A" * 700)
    served.faults["a.bin"] = ["cut"] * 1000
    with store.pins.reading(), pytest.raises(FetchError):
        local(store, served, "a.bin")
    assert store.index.total_bytes() == 1000
    served.faults.clear()
    other = make_store(recheck_hours=0)
    with other.pins.reading():
        assert local(other, served, "a.bin").read_bytes() == b"A" * 700
    assert other.index.total_bytes() == 700


def test_a_shard_is_of_the_version_that_was_scanned_or_not_at_all(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store()
    place = parse_url(served.url_of("a.bin"))
    store.known_shards([(place, store.files(place).info(place))])
    path = local(store, served, "a.bin")
    (served.folder / "a.bin").write_bytes(b"A" * 1000)
    os.utime(path, (0, 0))
    assert local(make_store(), served, "a.bin").read_bytes() == b"a" * 1000  # what runs goes on
    path.unlink()
    with pytest.raises(FetchError, match=r"a\.bin: it changed since it was scanned: start the loader again"):
        local(make_store(), served, "a.bin")
    store.known_shards([(place, store.files(place).info(place))])
    other = make_store()
    with other.pins.reading():
        assert local(other, served, "a.bin").read_bytes() == b"A" * 1000
        store.known_shards([(place, FileInfo(1000, "1000 ETag=another"))])
        assert path.read_bytes() == b"A" * 1000  # somebody reads it
    store.known_shards([(place, FileInfo(1000, "1000 ETag=another"))])
    assert not path.exists()


@pytest.mark.long
def test_a_run_is_never_given_a_shard_that_another_one_scanned_later(served: HttpFiles, make_store: MakeStore) -> None:
    """Two runs share the cache folder; the original changes between their scans."""
    old, old_worker, new = make_store(), make_store(), make_store(deadline_s=0.5)
    place = parse_url(served.url_of("a.bin"))
    old.known_shards([(place, old.files(place).info(place))])
    old_worker.expect(old.shards)
    with old.pins.reading():
        path = local(old, served, "a.bin")
        (served.folder / "a.bin").write_bytes(b"A" * 1000)
        new.known_shards([(place, new.files(place).info(place))])
        with (
            new.pins.reading(),
            pytest.raises(FetchError, match="an older version has been read by another process for"),
        ):
            local(new, served, "a.bin")
        assert path.read_bytes() == b"a" * 1000
    with new.pins.reading():
        assert local(new, served, "a.bin").read_bytes() == b"A" * 1000
    for store in (old, old_worker):
        with store.pins.reading(), pytest.raises(FetchError, match=r"a\.bin: it changed since it was scanned"):
            local(store, served, "a.bin")
    (served.folder / "a.bin").write_bytes(b"a" * 1000)  # it is what it was
    with old_worker.pins.reading():
        assert local(old_worker, served, "a.bin").read_bytes() == b"a" * 1000


@pytest.mark.parametrize(
    "name", ["../other/x.bin", "/etc/passwd", "../../http-other-00000000/x.bin", "sub/../../x.bin"]
)
def test_nothing_else_is_fetched(served: HttpFiles, make_store: MakeStore, name: str) -> None:
    store = make_store(served.url_of("sub"))
    asked = os.path.join(store.path_of(served.url_of("sub")), name)  # noqa: PTH118 - as a careless dataset does
    if not asked.startswith(str(store.folder)):
        assert store.local(asked) == asked
    else:
        with pytest.raises(DataError, match="it lies outside the URLs of the data paths, and nothing else is fetched"):
            store.local(asked)
    assert not served.gets
    assert not served.heads


def test_what_lies_beside_a_shard_is_fetched(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store(served.url_of("a.bin"))
    with pytest.raises(DataError, match="outside"):
        local(store, served, "b.bin")  # a.bin may be a folder, for all that is known
    place = parse_url(served.url_of("a.bin"))
    store.known_shards([(place, store.files(place).info(place))])
    assert local(store, served, "b.bin").read_bytes() == b"b" * 1000


def test_other_paths_pass_through(served: HttpFiles, make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    assert store.local("/data/x.bin") == "/data/x.bin"
    assert not (tmp_path / "cache").exists()


def test_a_damaged_index_is_made_anew(
    served: HttpFiles, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store()
    local(store, served, "a.bin")
    store.index._connection.close()
    for file in store.folder.glob(f"{FILE}*"):
        file.unlink()
    (store.folder / FILE).write_bytes(b"no database" * 500)
    again = make_store()
    assert again.index.total_bytes() == 1000
    assert "is damaged" in caplog.text
    assert local(again, served, "a.bin").read_bytes() == b"a" * 1000
    assert served.gets["a.bin"] == 2  # nobody knows which version it was


def test_a_removed_index_is_made_anew_and_counts_the_copies(served: HttpFiles, make_store: MakeStore) -> None:
    """Of which versions they are nobody knows: so a changed shard is not taken for the new one."""
    store = make_store()
    place = parse_url(served.url_of("a.bin"))
    store.known_shards([(place, store.files(place).info(place))])
    with store.pins.reading():
        local(store, served, "a.bin")
        local(store, served, "b.bin")
    store.index._connection.close()
    for file in store.folder.glob(f"{FILE}*"):
        file.unlink()
    (served.folder / "a.bin").write_bytes(b"A" * 1000)
    again = make_store()
    assert again.index.total_bytes() == 2000
    again.known_shards([(place, again.files(place).info(place))])
    with again.pins.reading():
        assert local(again, served, "a.bin").read_bytes() == b"A" * 1000
        assert local(again, served, "b.bin").read_bytes() == b"b" * 1000
    assert again.index.total_bytes() == 2000


def test_an_index_whose_maker_was_killed_counts_the_copies_too(served: HttpFiles, make_store: MakeStore) -> None:
    store = make_store()
    local(store, served, "a.bin")
    store.index._connection.close()
    for file in store.folder.glob(f"{FILE}*"):
        file.unlink()
    (store.folder / FILE).touch()
    (store.folder / ".parts" / "half.part").write_bytes(b"x" * 5)
    assert make_store().index.total_bytes() == 1000
    assert make_store().index.total_bytes() == 1000


@pytest.mark.long
def test_all_that_open_a_fresh_folder_together_can(tmp_path: Path) -> None:
    """The change of a new SQLite file to a WAL fails at once where another connection makes it."""
    together, failures = threading.Barrier(5), []

    def open_all() -> None:
        for number in range(20):
            together.wait(60)
            try:
                Index(tmp_path / str(number))
            except (ConfigError, FetchError) as error:
                failures.append(error)

    for number in range(20):
        (tmp_path / str(number)).mkdir()
    threads = [threading.Thread(target=open_all) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_parts_of_killed_processes_are_removed(served: HttpFiles, make_store: MakeStore, tmp_path: Path) -> None:
    parts = tmp_path / "cache" / "remote" / ".parts"
    parts.mkdir(parents=True)
    (parts / "00.part").write_bytes(b"x")
    local(make_store(), served, "a.bin")
    assert list(parts.iterdir()) == []
