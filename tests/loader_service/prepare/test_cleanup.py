"""What no run has used for a month leaves the cache folder; what somebody uses stays, however old."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader_service.prepare import cleanup
from loader_service.prepare.run import prepare
from stoker_proto.config import Config

MakeConfig = Callable[..., Config]
WriteShard = Callable[..., Path]
MONTH_S = 31 * 86400


@pytest.fixture(autouse=True)
def held() -> Iterator[None]:
    """Each test begins and ends as a process of its own."""
    end_process()
    yield
    end_process()


def end_process() -> None:
    while cleanup._held:
        os.close(cleanup._held.popitem()[1])


def age(root: Path, by_s: float = MONTH_S) -> None:
    for path in root.rglob("*"):
        then = path.stat().st_mtime - by_s
        os.utime(path, (then, then))


def files(root: Path, below: str) -> set[Path]:
    return {path for path in (root / below).rglob("*") if path.is_file()}


def test_what_no_run_has_used_for_a_month_is_removed(
    make_config: MakeConfig, write_shard: WriteShard, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard("a/a.jsonl", [3, 4])
    root = shard.parent / ".stoker"
    config = make_config(shard)
    first = prepare(config)
    write_shard("a/a.jsonl", [5, 6], seed=1)
    second = prepare(config)
    prepare(make_config(shard, action={"codec_options": {"num_bins": 64}}))
    entry = second.entries["train"][0]
    assert [len(files(root, name)) for name in ("codecs", "parts")] == [3, 2]
    (root / "codecs" / ".x.json.00ff.tmp").write_text("left by one that was killed")
    end_process()
    age(root, MONTH_S)
    assert prepare(config).entries["train"][0].fingerprint == entry.fingerprint
    assert not first.entries["train"][0].folder.exists()
    assert entry.folder.exists()
    assert len(files(root, "parts")) == 1  # which the entry needs when a part of its data changes
    assert len(files(root, "codecs")) == 1
    assert "removed" in caplog.text


def test_an_entry_that_nobody_uses_any_more_is_removed_whole(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shard = write_shard("a/a.jsonl", [3, 4])
    write_shard("a/b.jsonl", [3, 4], seed=2)
    one, both = make_config(shard), make_config(shard.parent)
    folders = [prepare(config).entries["train"][0].folder.parent for config in (one, both)]
    end_process()
    age(shard.parent / ".stoker")
    scanned.clear()
    assert prepare(one).entries["train"][0].num_records == 2
    assert scanned == []  # who comes back after a month finds what he left
    assert [folder.exists() for folder in folders] == [True, False]


def test_what_is_used_now_and_then_stays(make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]) -> None:
    config = make_config(write_shard("a/a.jsonl", [3, 4]))
    root = prepare(config).entries["train"][0].folder.parents[2]
    before = files(root, "entries") | files(root, "parts") | files(root, "codecs")
    scanned.clear()
    for _ in range(4):
        end_process()
        age(root, 20 * 86400)
        prepare(config)
    assert files(root, "entries") | files(root, "parts") | files(root, "codecs") == before
    assert scanned == []


@pytest.mark.process
def test_nothing_is_removed_while_another_process_uses_the_folder(
    make_config: MakeConfig, write_shard: WriteShard
) -> None:
    shard = write_shard("a/a.jsonl", [3, 4])
    root = shard.parent / ".stoker"
    config = make_config(shard)
    prepare(config)
    program = "import sys; from pathlib import Path; from loader_service.prepare.cleanup import use\n"
    program += "use(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    end_process()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdin is not None
        assert user.stdout.readline() == b"ready\n"
        age(root)
        before = files(root, "")
        prepare(make_config(shard, action={"chunk": 2}))
        assert before - files(root, "") == set()
        user.stdin.close()
        user.wait(60)
    end_process()
    age(root)
    prepare(make_config(shard, action={"chunk": 2}))
    assert before - files(root, "") != set()


def test_a_folder_that_is_only_read_is_left_alone(tmp_path: Path) -> None:
    cleanup.use(tmp_path / "absent")
    assert not cleanup._held
    cleanup.note_use(tmp_path / "absent")
