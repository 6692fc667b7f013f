"""`loader.disk_cache_gb` with real loaders: no byte changes, and a later run decodes nothing."""

from __future__ import annotations

import signal
from pathlib import Path

from stoker_proto.config.reader import load_config
from tests.end_to_end.conftest import LENGTHS
from tests.end_to_end.fleet import pull, run_cli, serving
from trainer.feed.feed import Feed


def decoded_by(config: Path, address: str) -> float:
    """Records that a loader decoded for an epoch."""
    with Feed(load_config(config, [f"cluster.loader_addresses=[{address}]"]), "train", 0, 1) as feed:
        feed.connect()
        assert sum(1 for _ in feed.steps(0, 0)) == -(-sum(LENGTHS) // 8)
        (progress,) = feed.progress(fresh_within_s=30).values()
    assert progress["samples"] == sum(LENGTHS)
    return progress["records_decoded"]


def test_two_loaders_fill_it_one_is_killed_and_the_next_run_decodes_nothing(config: Path, tmp_path: Path) -> None:
    with serving(config) as loader:
        expected = pull(config, [loader.address])
    folder, log = tmp_path / "disk", tmp_path / "log"
    kept = "--set", "loader.disk_cache_gb=0.1", "--set", f"loader.disk_cache_dir={folder}"
    with serving(config, *kept, log=log) as first, serving(config, *kept, log=log) as second:

        def kill_one(step: int) -> None:
            if step == 3:
                first.end(signal.SIGKILL)

        filling = pull(config, [first.address, second.address], "trainer.feed.ticket_deadline_s=1", on_step=kill_one)
    with serving(config, *kept, log=log) as loader:
        between = pull(config, [loader.address])  # keeps what the killed one had in work
    with serving(config, *kept, "--set", "loader.workers=2", log=log) as loader:
        assert decoded_by(config, loader.address) == 0
        later = pull(config, [loader.address], ranks=2)
    for run in (filling, between, later):
        assert run.keys == expected.keys
        assert run.steps == expected.steps
    assert [line for line in log.read_text().splitlines() if "encoded" in line] == []


def test_the_check_names_a_folder_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "cache"
    settings = "--set", "loader.disk_cache_gb=1", "--set", f"loader.disk_cache_dir={folder}"
    done = run_cli("serve", "--config", str(config), *settings, "--check")
    assert done.returncode == 1
    assert f"loader.disk_cache_dir: {folder.resolve()} cannot be written (Not a directory): name another" in done.stderr
