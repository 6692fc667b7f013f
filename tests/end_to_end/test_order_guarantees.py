"""G1-G4 with real processes: every sample once, the same bytes whoever serves and whoever asks, resume anywhere."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from stoker_proto.config.reader import load_config
from tests.end_to_end.conftest import LENGTHS
from tests.end_to_end.fleet import pull, run_cli, serving, write_config, write_demonstrations
from trainer.feed.feed import Feed

ALL_KEYS = sorted((0, record, timestep) for record, length in enumerate(LENGTHS) for timestep in range(length))


def test_one_epoch_holds_every_sample_once_and_the_next_one_in_another_order(config: Path) -> None:
    with serving(config) as loader:
        first = pull(config, [loader.address])
        second = pull(config, [loader.address], epoch=1)
    assert sorted(first.keys) == ALL_KEYS
    assert sorted(second.keys) == ALL_KEYS
    assert first.keys != second.keys
    neighbours = sum(a[1] == b[1] and b[2] == a[2] + 1 for a, b in zip(first.keys, first.keys[1:], strict=False))
    assert neighbours < len(ALL_KEYS) / 4  # shuffled, not read from front to back


def test_global_batches_are_the_same_for_any_loaders_workers_ranks_and_micro_batches(config: Path) -> None:
    with serving(config) as one:
        expected = pull(config, [one.address])
        ranks = pull(config, [one.address], "trainer.micro_batch_size=2", ranks=2)
        micro = pull(config, [one.address], "trainer.micro_batch_size=1", "trainer.feed.prefetch=9")
    with serving(config, "--set", "loader.workers=3", "--set", "loader.cache_mb=1") as a, serving(config) as b:
        several = pull(config, [a.address, b.address], ranks=2)
    for other in (ranks, micro, several):
        assert other.keys == expected.keys
        assert other.steps == expected.steps


def test_a_resume_in_mid_epoch_gives_the_remaining_batches(config: Path) -> None:
    with serving(config) as loader:
        whole = pull(config, [loader.address])
    with serving(config) as fresh:
        rest = pull(config, [fresh.address], first_sample=56)
    assert rest.steps == whole.steps[7:]
    assert rest.keys == whole.keys[56:]


def test_a_killed_loader_costs_no_sample_and_changes_no_byte(config: Path) -> None:
    with serving(config) as loader:
        expected = pull(config, [loader.address])
    with serving(config) as first, serving(config) as second:

        def kill_one(step: int) -> None:
            if step == 3:
                first.end(signal.SIGKILL)

        survived = pull(config, [first.address, second.address], "trainer.feed.ticket_deadline_s=1", on_step=kill_one)
    assert survived.keys == expected.keys
    assert survived.steps == expected.steps


def test_a_killed_worker_is_replaced_and_changes_no_byte(config: Path) -> None:
    with serving(config) as loader:
        expected = pull(config, [loader.address])
    with serving(config, "--set", "loader.workers=2", "--set", "loader.read_ahead=false") as loader:
        killed: list[int] = []

        def kill_a_worker(step: int) -> None:
            if step == 2:
                worker = psutil.Process(loader.process.pid).children()[0]
                killed.append(worker.pid)
                worker.kill()

        survived = pull(config, [loader.address], "trainer.feed.prefetch=2", on_step=kill_a_worker)
        workers = [child.pid for child in psutil.Process(loader.process.pid).children()]
    assert survived.keys == expected.keys
    assert survived.steps == expected.steps
    assert len(workers) == 2
    assert killed[0] not in workers


def test_each_record_is_decoded_once_an_epoch_also_when_read_ahead_of_it(
    tmp_path: Path, model: Path, demos: Path
) -> None:
    """With augmentation every epoch needs its own frames; without, those of the first are kept."""
    for augmented, expected in ((True, 2 * len(LENGTHS)), (False, len(LENGTHS))):
        config = write_config(tmp_path, model, [demos], augment={"enabled": augmented})
        with serving(config, "--set", "trainer.epochs=2") as loader:
            loaded = load_config(config, [f"cluster.loader_addresses=[{loader.address}]", "trainer.epochs=2"])
            with Feed(loaded, "train", 0, 1) as feed:
                feed.connect()
                for epoch in (0, 1):
                    assert sum(1 for _ in feed.steps(epoch, 0)) == -(-sum(LENGTHS) // 8)
                (progress,) = feed.progress(fresh_within_s=30).values()
        assert progress["samples"] == 2 * sum(LENGTHS)
        assert progress["records_decoded"] == expected


def test_a_drained_loader_costs_no_sample(config: Path) -> None:
    with serving(config) as loader:
        expected = pull(config, [loader.address])
    with serving(config) as first, serving(config) as second:

        def drain_one(step: int) -> None:
            if step == 3:
                first.process.send_signal(signal.SIGTERM)

        drained = pull(config, [first.address, second.address], on_step=drain_one)
        assert first.process.wait(60) == 0
    assert drained.steps == expected.steps


def test_augmentation_repeats_with_the_epoch_and_leaves_validation_alone(
    tmp_path: Path, model: Path, demos: Path
) -> None:
    plain = write_config(tmp_path, model, [demos], val_data_paths=[str(demos)])
    augmented = write_config(tmp_path, model, [demos], val_data_paths=[str(demos)], augment={"enabled": True})
    with serving(plain) as loader:
        without = pull(plain, [loader.address])
        val = pull(plain, [loader.address], split="val")
    with serving(augmented) as a, serving(augmented) as b:
        once = pull(augmented, [a.address])
        again = pull(augmented, [b.address])
        val_too = pull(augmented, [a.address, b.address], split="val")
    assert once.steps == again.steps
    assert once.keys == without.keys
    assert once.steps != without.steps
    assert val_too.steps == val.steps
    assert sorted(val.keys) == ALL_KEYS


def test_loaders_that_each_hold_their_own_entry(tmp_path: Path, model: Path) -> None:
    parts = [write_demonstrations(tmp_path / name, [6, 9, 4, 8], seed=i) for i, name in enumerate("ab")]
    config = write_config(tmp_path, model, parts)
    with serving(config) as whole:
        expected = pull(config, [whole.address])
    # A loader that cannot see all the data cannot fit the codec: it is given.
    codec = tmp_path / "codec.json"
    assert run_cli("prepare", "--config", str(config), "--codec-out", str(codec)).returncode == 0
    given = ("--set", f"data.action.codec_path={codec}")
    with (
        serving(config, "--shards", str(parts[0]), *given) as a,
        serving(config, "--shards", str(parts[1]), *given) as b,
    ):
        split = pull(config, [a.address, b.address], f"data.action.codec_path={codec}")
    assert split.keys == expected.keys
    assert split.steps == expected.steps
