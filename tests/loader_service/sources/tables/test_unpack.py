"""Compressed shards: unpacked once, into the cache folder, by whoever comes first."""

from __future__ import annotations

import errno
import gzip
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from loader_service.sources.tables import unpack
from loader_service.sources.tables.dataset import TableDataset
from loader_service.sources.tables.unpack import arrow_file, plain_file
from stoker_proto.errors import ConfigError, DataError

CONTENT = b'{"text": "x"}\n' * 1000


def pack(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else zstandard.compress(content))
    return path


def test_it_is_done_once_for_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plain_file(pack(tmp_path / "a.jsonl.gz"), None)
    assert first.read_bytes() == CONTENT
    assert first.is_relative_to(tmp_path / ".stoker" / "unpacked")
    monkeypatch.setattr(unpack, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert plain_file(tmp_path / "a.jsonl.gz", None) == first
    os.utime(tmp_path / "a.jsonl.gz")  # touched, not changed
    assert plain_file(tmp_path / "a.jsonl.gz", None) == first
    os.link(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz")  # the same content under another name
    assert plain_file(tmp_path / "b.jsonl.gz", None) == first


def test_what_is_missing_is_made_anew_and_what_is_old_goes(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.jsonl.zst")
    first = plain_file(shard, None)
    first.unlink()
    assert plain_file(shard, None).read_bytes() == CONTENT
    pack(shard, b'{"text": "other"}\n')
    second = plain_file(shard, None)
    assert second.read_bytes() == b'{"text": "other"}\n'
    assert second != first
    assert not first.parent.exists()


def test_several_frames_are_one_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(CONTENT) + zstandard.compress(b'{"text": "y"}'))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(CONTENT) + gzip.compress(b'{"text": "y"}'))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        assert plain_file(tmp_path / name, None).read_bytes() == CONTENT + b'{"text": "y"}'


def test_the_cache_folder_of_the_config_is_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shard = pack(tmp_path / "data" / "a.jsonl.gz")
    assert plain_file(shard, str(tmp_path / "cache")).is_relative_to(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl.gz"]


def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match=r"no room to unpack it .* data\.cache_dir, or unpack the file yourself"):
        plain_file(pack(tmp_path / "a.jsonl.gz"), None)
    assert not list(tmp_path.rglob("*plain*"))


@pytest.mark.parametrize("full", ["names", "content", "arrow"])
def test_a_full_disk_is_said_and_nothing_half_written_stays(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full where the shard's digest is noted, while its content is written, and where another library writes."""

    def write_bytes(path: Path, content: bytes) -> None:
        if "names" in path.parts:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        with path.open("wb") as file:
            file.write(content)

    def blocks(_: Path) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    def arrow(_: object, target: Path, __: object) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    if full == "names":
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(unpack, "_blocks", blocks)
    monkeypatch.setattr(unpack, "write_arrow", arrow)
    monkeypatch.setattr(unpack, "ParquetTable", lambda *_: None)
    shard = tmp_path / "a.jsonl.gz"
    with shard.open("wb") as file:
        file.write(gzip.compress(CONTENT))
    with pytest.raises(
        ConfigError, match=r"no room to unpack it in .*(device|exceeded)\): name a folder on another disk"
    ):
        arrow_file(shard, shard, None, None) if full == "arrow" else plain_file(shard, None)
    left = [path for path in (tmp_path / ".stoker").rglob("*") if path.is_file() and path.name != "lock"]
    assert not [path for path in left if path.suffix == ".tmp" or path.stat().st_size == 0]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .* data\.cache_dir"):
        plain_file(pack(tmp_path / "a.jsonl.gz"), str(tmp_path / "file"))


def test_a_frame_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(CONTENT) + writer.flush())
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: damaged zstd data .*memory"):
        plain_file(tmp_path / "a.jsonl.zst", None)


def test_a_missing_library_is_a_command_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"reading \.zst files needs zstandard .*pip install 'stoker\[tables\]'"):
        plain_file(pack(tmp_path / "a.jsonl.zst"), None)


def _plain(shard: str) -> str:
    return str(plain_file(Path(shard), None))


@pytest.mark.process
def test_processes_that_start_together_share_one_copy(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.jsonl.gz", CONTENT * 500)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_plain, [str(shard)] * 4, chunksize=1)
    assert len(set(found)) == 1
    assert len(Path(found[0]).read_bytes()) == len(CONTENT) * 500
    assert len(list(tmp_path.rglob("plain"))) == 1


def test_reading_unpacks_where_the_cache_has_none(tmp_path: Path, make_tables: Callable[..., TableDataset]) -> None:
    shard = pack(tmp_path / "a.jsonl.gz", b'{"text": "x"}\n{"text": "y"}\n')
    records = list(make_tables("text").scan(shard))
    for file in tmp_path.rglob("plain"):
        file.unlink()
    (sample,) = make_tables("text").read(shard, records[1].offset, records[1].size)
    assert sample.text == "y"


def test_errors_about_unpacked_content_name_the_shard(tmp_path: Path, make_tables: Callable[..., TableDataset]) -> None:
    shard = pack(tmp_path / "a.jsonl.gz", b'{"text": "x"}\n{"text": "y"}\n')
    dataset = make_tables("text")
    with pytest.raises(DataError, match=r"^\S+a\.jsonl\.gz:3: it ends before byte 110"):
        list(dataset.read(shard, 100, 10))
