"""Tokens of entries that nobody counted: those of the first good sample, times the samples; the same on every loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import prepare
from loader_service.sources.base import Sample
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto import PROTOCOL_VERSION
from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Epoch, Hello, Lanes
from tests.end_to_end.fleet import serving, write_config, write_demonstrations
from tests.loader_service.server.test_server import peer_of
from tests.tiny_models import write_model_folder

LENGTHS = [4, 7, 5, 3, 6, 2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    jsonl = write_demonstrations(tmp_path / "demos", LENGTHS)
    (tmp_path / "model").mkdir()
    return write_config(
        tmp_path, write_model_folder(tmp_path / "model"), [jsonl], weigh_by="tokens", on_bad_sample="skip",
        bad_sample_budget=10,
    )  # fmt: skip


def tokens_of(config: Config) -> int:
    prepared = prepare(config)
    processor = Processor.build(config, prepared.codec, prepared.states)
    return check_first_records(config, prepared, processor)["train"][0]


def damage(tmp_path: Path, records: range) -> None:
    for record in records:
        (tmp_path / "demos" / f"traj_{record}" / "obs.npz").write_bytes(b"no archive")


def test_the_first_good_sample_stands_for_all(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [])
    prepared = prepare(config)
    encoder = RecordEncoder(config.data, Processor.build(config, prepared.codec))
    manifest = prepared.entries["train"][0]
    row = encoder.encode(manifest, 0, 0).samples[0]
    assert tokens_of(config) == len(row.input_ids) * sum(LENGTHS)
    elsewhere = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "other")))
    assert tokens_of(elsewhere) == tokens_of(config)


@pytest.mark.parametrize("num_bad", [1, 5])
def test_bad_ones_in_front_of_it_are_passed_over(num_bad: int, config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [])
    whole = tokens_of(config)
    damage(tmp_path, range(num_bad))
    assert tokens_of(config) == whole > 0  # instruction and action have the same length everywhere


def test_none_is_good(config_file: Path, tmp_path: Path) -> None:
    damage(tmp_path, range(len(LENGTHS)))
    assert tokens_of(load_config(config_file, [])) == 0


def test_no_more_than_the_first_records_are_read(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_file, [])
    opened: list[int] = []
    real = ManiOpenPIDataset.read

    def read(self: ManiOpenPIDataset, shard: Path, offset: int, size: int) -> Iterable[Sample]:
        opened.append(offset)
        return real(self, shard, offset, size)

    monkeypatch.setattr(ManiOpenPIDataset, "read", read)
    tokens_of(config)
    assert len(opened) == 3


@pytest.mark.process
def test_a_live_loader_tells_ranks(config_file: Path) -> None:
    expected = tokens_of(load_config(config_file, []))
    with serving(config_file) as loader, peer_of(loader) as peer:
        peer.ask(Hello(protocol=PROTOCOL_VERSION, client="test", rank=0, world_size=1, fingerprints={}))
        lanes = peer.ask(Epoch(split="train", epoch=0, entries=[0]))
        assert isinstance(lanes, Lanes)
        assert lanes.tokens == {0: expected}
