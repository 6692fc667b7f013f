"""`Feed` over real sockets against a fake loader: batches, resume, faults, refusals, deadlines, clean ends."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from stoker_proto.config import SourceConfig
from stoker_proto.errors import ConfigError, DataError, DeadlineError, RefusedError
from stoker_proto.host.ports import free_port
from tests.trainer.feed.client.core_driver import EXPECTED
from tests.trainer.feed.fake_loader import (
    LENGTHS,
    FakeLoader,
    StandInDecoder,
    make_config,
    wait_for,
)
from trainer.feed.batch import Decoding, MicroBatch, StepBatch
from trainer.feed.feed import Feed


def make_feed(*addresses: str, rank: int = 0, world_size: int = 1, **overrides: object) -> Feed:
    pins, threads = overrides.pop("pins", None), overrides.pop("decode_threads", 1)
    config = make_config(addresses, **overrides)
    decoding = Decoding(processor=StandInDecoder(), threads=threads)  # type: ignore[arg-type]
    return Feed(config, "train", rank, world_size, pins=pins, decoding=decoding)  # type: ignore[arg-type]


def wait_ready(feed: Feed, count: int) -> None:
    """Until so many loaders can be asked for tickets of epoch 0."""
    wait_for(lambda: feed._driver.call(lambda core, now: sum(bool(x.answered) for x in core.fleet.loaders)) == count)


def rows(steps: list[StepBatch]) -> list[tuple[int, ...]]:
    return [
        tuple(key) for step in steps for batch in step.micro_batches for key in batch.keys[: batch.num_rows].tolist()
    ]


def test_an_epoch_and_what_is_known_of_it() -> None:
    with FakeLoader() as loader, make_feed(loader.address) as feed:
        info = feed.connect()
        assert info.num_samples == 60
        assert info.fingerprints["codec"] == "c1"
        assert info.loaders == {loader.address: "fake"}
        steps = list(feed.steps(0, 0))
    assert rows(steps) == EXPECTED
    assert [(step.step, step.num_steps, step.first_sample, step.next_sample) for step in steps[-2:]] == [
        (6, 8, 48, 56),
        (7, 8, 56, 60),
    ]
    last = steps[-1].micro_batches
    assert [batch.num_rows for batch in last] == [4, 0]
    assert all(len(batch.input_ids) == 4 for batch in last)


def digests(steps: list[StepBatch]) -> list[bytes]:
    return [digest for step in steps for batch in step.micro_batches for digest in batch.row_digests]


def test_bytes_are_the_same_for_any_number_of_loaders_and_ranks() -> None:
    with FakeLoader(name="a") as a, FakeLoader(name="b") as b:
        with make_feed(a.address) as feed:
            feed.connect()
            alone = digests(list(feed.steps(0, 0)))
        parts: list[list[MicroBatch]] = []
        for rank in (0, 1):
            with make_feed(a.address, b.address, rank=rank, world_size=2, decode_threads=2) as feed:
                feed.connect()
                wait_ready(feed, 2)
                parts.append([batch for step in feed.steps(0, 0) for batch in step.micro_batches])
        assert a.tickets
        assert b.tickets
    together = [digest for pair in zip(*parts, strict=True) for batch in pair for digest in batch.row_digests]
    assert together == alone


def test_resume_gives_the_remaining_batches() -> None:
    with FakeLoader() as loader:
        with make_feed(loader.address) as feed:
            feed.connect()
            whole = list(feed.steps(0, 0))
        with make_feed(loader.address) as feed:
            feed.connect()
            rest = list(feed.steps(0, whole[2].next_sample))
    assert digests(rest) == digests(whole[3:])


def test_going_on_costs_nothing_and_going_elsewhere_starts_anew() -> None:
    with FakeLoader() as loader, make_feed(loader.address, epochs=2) as feed:
        feed.connect()
        first = []
        for step in feed.steps(0, 0):
            first.append(step)
            if len(first) == 3:
                break
        second = list(feed.steps(0, first[-1].next_sample))
        asked = sum(ticket.count for ticket in loader.tickets if ticket.epoch == 0)
        assert rows(first + second) == EXPECTED
        assert asked == 60
        wait_for(lambda: any(ticket.epoch == 1 for ticket in loader.tickets))  # the next epoch, ahead of need
        assert rows(list(feed.steps(1, 0))) == EXPECTED
        assert sum(ticket.count for ticket in loader.tickets if ticket.epoch == 1) == 60
        assert rows(list(feed.steps(0, 0))) == EXPECTED
        assert rows(list(feed.steps(0, 60))) == []


@pytest.mark.long
def test_a_loader_killed_and_one_that_joins_alter_nothing() -> None:
    port = free_port()
    with FakeLoader(name="a") as a, make_feed(a.address, f"tcp://127.0.0.1:{port}", ticket_deadline_s=1.0) as feed:
        feed.connect()
        stream = feed.steps(0, 0)
        steps = [next(stream), next(stream)]
        with FakeLoader(name="b", address=f"tcp://127.0.0.1:{port}") as b:
            b.ignore_tickets = True
            wait_ready(feed, 2)
            while not b.tickets:
                steps.append(next(stream))
        steps += list(stream)
    assert rows(steps) == EXPECTED


def test_a_restarted_loader_is_greeted_and_asked_again() -> None:
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with make_feed(address) as feed:
        with FakeLoader(name="a", address=address) as first:
            feed.connect()
            stream = feed.steps(0, 0)
            steps = [next(stream)]
            first.ignore_tickets = True
        with FakeLoader(name="b", address=address) as second:
            steps += list(stream)
            assert second.hellos
            assert second.hellos[0].fingerprints["codec"] == "c1"
    assert rows(steps) == EXPECTED


@pytest.mark.long
def test_a_mute_loader_is_replaced_after_the_ticket_deadline() -> None:
    with FakeLoader(name="a") as a, FakeLoader(name="b") as b:
        with make_feed(a.address, b.address, ticket_deadline_s=0.2) as feed:
            feed.connect()
            wait_ready(feed, 2)
            b.ignore_tickets = True
            steps = list(feed.steps(0, 0))
        assert b.tickets
    assert rows(steps) == EXPECTED


def test_answers_that_come_twice_count_once() -> None:
    with FakeLoader() as loader, make_feed(loader.address) as feed:
        loader.twice = True
        feed.connect()
        assert rows(list(feed.steps(0, 0))) == EXPECTED


def test_a_draining_loader_is_left_for_the_other() -> None:
    with FakeLoader(name="a") as a, FakeLoader(name="b") as b, make_feed(a.address, b.address) as feed:
        feed.connect()
        wait_ready(feed, 2)
        stream = feed.steps(0, 0)
        steps = [next(stream)]
        b.drain.set()
        wait_for(lambda: feed._driver.call(lambda core, now: any(one.draining for one in core.fleet.loaders)))
        feed.progress(fresh_within_s=30.0)  # b has answered this, so it has seen all that was sent before
        before = len(b.tickets)
        steps += list(stream)
        assert len(b.tickets) == before
    assert rows(steps) == EXPECTED


def test_bad_data_is_raised_where_it_lies() -> None:
    with FakeLoader() as loader, make_feed(loader.address) as feed:
        lane, position = EXPECTED[30][1:]
        loader.data_error_at = (lane, position)
        feed.connect()
        steps: list[StepBatch] = []
        with pytest.raises(DataError, match=r"record .*: truncated"):
            steps.extend(feed.steps(0, 0))
    assert rows(steps) == EXPECTED[:24]


def test_nobody_there() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with make_feed(address, connect_deadline_s=0.3) as feed, pytest.raises(DeadlineError) as caught:
        feed.connect()
    assert f"{address} not connected (nothing listens there)" in str(caught.value)
    assert "check that loader-serve runs there" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with make_feed(address, connect_deadline_s=0.3) as feed, pytest.raises(DeadlineError) as caught:
            feed.connect()
    assert "has not spoken ZeroMQ: is it a loader's port?" in str(caught.value)


def test_address_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="write tcp://HOST:PORT"):
        make_feed("127.0.0.1:5555")


def test_missing_entry_is_named() -> None:
    expected = pytest.raises(DeadlineError, match=r"entry 1, data.train_data_paths\[1\] \(second.jsonl\)")
    with FakeLoader(held=[0]) as loader, make_feed(loader.address, connect_deadline_s=0.3) as feed, expected:
        feed.connect()


@pytest.mark.long
def test_all_gone_ends_with_names_after_the_data_deadline() -> None:
    with FakeLoader() as loader:
        feed = make_feed(loader.address, data_deadline_s=0.5)
        feed.connect()
        stream = feed.steps(0, 0)
        next(stream)
        loader.kill()
        with feed, pytest.raises(DeadlineError) as caught:
            list(stream)
    assert "no data for 0.5 s" in str(caught.value)
    assert loader.address in str(caught.value)
    assert "last heard of" in str(caught.value)


def test_refusals_carry_the_difference() -> None:
    expected = pytest.raises(RefusedError, match="image: the loader has i2, this rank i1")
    with FakeLoader(refuse=[["image", "i2", "i1"]]) as loader, make_feed(loader.address) as feed, expected:
        feed.connect()
    expected = pytest.raises(RefusedError, match="codec: the loader has c1, this rank of the checkpoint")
    with FakeLoader() as loader, make_feed(loader.address, pins={"codec": "of the checkpoint"}) as feed, expected:
        feed.connect()


def test_a_stranger_in_mid_run_does_not_end_the_validation_that_comes_later(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    other = f"tcp://127.0.0.1:{port}"
    with FakeLoader() as good:
        config = make_config([good.address, other])
        with (
            Feed(config, "train", 0, 1, decoding=Decoding(processor=StandInDecoder())) as train,
            Feed(config, "val", 0, 1, decoding=Decoding(processor=StandInDecoder())) as val,
        ):
            train.connect()
            val.connect()
            val.begin()
            steps = train.steps(0, 0)
            first = next(steps)
            with FakeLoader(address=other, fingerprints={"codec": "another"}):
                wait_for(lambda: caplog.text.count("codec: the loader has another") == 2)
            assert rows([first, *steps]) == EXPECTED
            assert len(rows(list(val.steps(0, 0)))) == sum(LENGTHS[0])


def test_another_order_than_the_checkpoint_is_refused() -> None:
    with pytest.raises(
        RefusedError, match=r"data\.order, the sources or their weights are not those of the checkpoint"
    ):
        make_feed("tcp://127.0.0.1:1", pins={"order": "another"})


def test_how_much_an_epoch_takes_of_each_source_is_among_the_fingerprints() -> None:
    with FakeLoader() as loader:
        config = make_config([loader.address])
        robots = SourceConfig(dataset_type="mani_openpi", paths=("first.jsonl",), weight=2.0, name="robots")
        chats = SourceConfig(dataset_type="chat", paths=("second.jsonl",), weight=1.0, name="chats")
        data = replace(config.data, dataset_type=None, train_data_paths=(), val_data_paths=(), sources=(robots, chats))
        with Feed(replace(config, data=data), "train", 0, 1, decoding=Decoding(processor=StandInDecoder())) as feed:
            assert len(feed.connect().fingerprints["mixture"]) == 64
        with make_feed(loader.address) as feed:
            assert "mixture" not in feed.connect().fingerprints


def test_no_validation_data() -> None:
    config = make_config(["tcp://127.0.0.1:1"])
    object.__setattr__(config.data, "val_data_paths", ())
    with pytest.raises(
        ConfigError, match=r"the config names no val data \(data\.val_data_paths, or paths of data\.sources\)"
    ):
        Feed(config, "val", 0, 1)


@pytest.mark.long
def test_wait_is_the_time_that_the_consumer_was_blocked() -> None:
    with FakeLoader() as loader, make_feed(loader.address, ticket_deadline_s=0.2) as feed:
        feed.connect()
        loader.mute = True
        release = threading.Timer(0.3, lambda: setattr(loader, "mute", False))
        stream = feed.steps(0, 0)
        began = time.monotonic()
        release.start()
        step = next(stream)
        waited = time.monotonic() - began
        release.join()
        assert 0.1 < step.wait_s <= waited


def test_close_while_another_thread_waits() -> None:
    with FakeLoader() as loader:
        feed = make_feed(loader.address)
        feed.connect()
        loader.mute = True
        caught: list[BaseException] = []

        def consume() -> None:
            try:
                list(feed.steps(0, 0))
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        wait_for(lambda: loader.hellos)
        feed.close()
        thread.join(60)
        feed.close()
    assert "closed" in str(caught[0])
    assert not [t for t in threading.enumerate() if t.name.startswith("stoker")]


def test_fresh_progress() -> None:
    with FakeLoader() as loader, make_feed(loader.address) as feed:
        feed.connect()
        list(feed.steps(0, 0))
        progress = feed.progress(fresh_within_s=30.0)
        assert progress[loader.address]["samples"] == 60
        assert feed.first_progress()[loader.address]["samples"] == 0
        assert feed.bytes_received > 60 * 10


def test_pixels_are_those_of_the_images() -> None:
    with FakeLoader() as loader, make_feed(loader.address) as feed:
        feed.connect()
        batch = next(feed.steps(0, 0)).micro_batches[0]
    assert batch.pixels is not None
    assert batch.pixels.shape[0] == batch.image_counts.sum()
    assert np.ptp(batch.pixels.reshape(len(batch.pixels), -1), axis=1).max() == 0
