"""What a worker makes of tickets, from the files that the front left it."""

from __future__ import annotations

import select
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loader_service.pieces.excluded import Excluded
from loader_service.pieces.service import PieceService
from loader_service.plan.lane_plan import PlanKey
from loader_service.plan.plan_files import make_plan
from loader_service.prepare.run import Prepared, prepare
from loader_service.remote import shared_store
from loader_service.remote.shared_store import remote_store
from loader_service.remote.url import parse_url
from loader_service.server.served import Served
from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Failure, Message, Piece, Shards, Ticket
from stoker_proto.wire.row_bits import pack_rows
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.tiny_models import write_model_folder

TICKET = Ticket(ticket=5, split="train", epoch=0, lane=0, start=0, count=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    demos = write_demonstrations(tmp_path / "demos", [4] * 6)
    return load_config(write_config(tmp_path, write_model_folder(tmp_path / "model"), [demos]), [])


@pytest.fixture
def prepared(config: Config) -> Prepared:
    return prepare(config)


@pytest.fixture
def bench(tmp_path: Path, config: Config, prepared: Prepared) -> Iterator[PieceService]:
    write_job(tmp_path, config, prepared)
    made = PieceService(tmp_path)
    yield made
    made.close()


def write_job(run_dir: Path, config: Config, prepared: Prepared) -> None:
    """What `loader-serve` writes for its workers."""
    processor = Processor.build(config, prepared.codec)
    Served(config, prepared.entries, {}, processor.to_json(), {}, "loader").write_job(
        run_dir, processor, Excluded.read(config.data), 1, 1
    )


def answer(bench: PieceService, ticket: Ticket) -> Message:
    bench.submit(b"rank", ticket)
    while (found := bench.take()) is None:
        assert select.select([bench.readable], [], [], 20)[0], "no answer"
        bench.acknowledge()
    return encoding.decode(found[1])


@pytest.mark.long
def test_a_ticket_whose_plan_was_forgotten_is_asked_again(
    bench: PieceService, tmp_path: Path, config: Config, prepared: Prepared
) -> None:
    """The front may forget a plan between its word to a worker and the worker's turn."""
    failure = answer(bench, TICKET)
    assert isinstance(failure, Failure)
    assert (failure.ticket, failure.reason) == (5, "unavailable")
    manifest = prepared.entries["train"][0]
    make_plan(manifest, config.data, PlanKey("train", 0, 0)).save(tmp_path)
    assert isinstance(answer(bench, TICKET), Piece)


def test_a_part_tells_where_rows_are_and_sends_those_that_it_holds(
    tmp_path: Path, config: Config, prepared: Prepared
) -> None:
    """Six records of one shard, two of them in lane 0; the manifest says here that one of these lies in another shard."""
    whole = prepared.entries["train"][0]
    plan = make_plan(whole, config.data, PlanKey("train", 0, 0))
    plan.save(tmp_path)
    write_job(tmp_path, config, prepared)
    bench = PieceService(tmp_path)
    try:
        shard_index = np.zeros(6, np.uint32)
        shard_index[plan.rows(0, 0, 1).samples[0][0]] = 1
        bench._manifests["train", 0] = replace(
            whole, shards=(*whole.shards, "b.jsonl"), shard_index=shard_index, held=frozenset({0}), stamps=()
        )
        asked = replace(TICKET, count=plan.lane_length(0))
        shards = [int(shard_index[record]) for record, _ in plan.rows(0, 0, asked.count).samples]
        told = answer(bench, asked)
        assert isinstance(told, Shards)
        assert (told.ticket, told.loader, told.shards) == (5, "loader", shards)
        here, there = (np.flatnonzero(np.array(shards) == shard) for shard in (0, 1))
        assert set(shards) == {0, 1}
        piece = answer(bench, replace(asked, ticket=6, rows=pack_rows(here, asked.count)))
        assert isinstance(piece, Piece)
        assert [shard_index[record] for record in piece.keys[:, 1]] == [0] * len(here)
        failure = answer(bench, replace(asked, ticket=7, rows=pack_rows(there, asked.count)))
        assert isinstance(failure, Failure)
        assert (failure.ticket, failure.reason) == (7, "unavailable")
        assert "the shard b.jsonl" in failure.message
    finally:
        bench.close()


@pytest.mark.long
def test_workers_expect_the_remote_shards_that_the_front_knows(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that another process has scanned since into the cache folder they share."""
    url = f"file://{tmp_path}/demos/demos.jsonl"
    config = replace(config, data=replace(config.data, train_data_paths=(url,), remote=RemoteConfig(min_free_gb=0.0)))
    prepared = prepare(config)
    write_job(tmp_path, config, prepared)
    front = remote_store(config.data)
    assert front is not None
    assert list(front.shards) == [front.key_of(parse_url(url))]
    monkeypatch.setattr(shared_store, "_stores", {})  # as in another process
    PieceService(tmp_path).close()
    worker = remote_store(config.data)
    assert worker is not None
    assert worker is not front
    assert worker.shards == front.shards


@pytest.mark.long
def test_plans_are_dropped_least_recently_used(
    bench: PieceService, tmp_path: Path, config: Config, prepared: Prepared
) -> None:
    """The plan of the epoch that is trained stays, however many others a rank asks for once."""
    manifest = prepared.entries["train"][0]
    for epoch in range(9):
        make_plan(manifest, config.data, PlanKey("train", epoch, 0)).save(tmp_path)
    for epoch in (*range(8), 0):
        assert isinstance(answer(bench, replace(TICKET, epoch=epoch)), Piece)
    for epoch in (0, 1):  # what is mapped stays readable
        assert [file.unlink() for file in tmp_path.glob(f"plan-train-{epoch}-*")]
    assert isinstance(answer(bench, replace(TICKET, epoch=8)), Piece)
    assert isinstance(answer(bench, TICKET), Piece)
    assert isinstance(answer(bench, replace(TICKET, epoch=1)), Failure)
