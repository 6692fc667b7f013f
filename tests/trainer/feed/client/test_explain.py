"""What a rank says when no data comes: which loaders, which entries with their paths, and when they were last heard of."""

from __future__ import annotations

import pytest

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.config import FeedConfig, OrderConfig
from stoker_proto.wire.messages import Welcome
from trainer.feed.client import explain
from trainer.feed.client.fleet import Fleet, State
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import LaneShares


@pytest.fixture
def fleet() -> Fleet:
    """Two loaders that each hold one of two entries, greeted at second 100."""
    options = CoreOptions(
        split="train",
        entries=("data.train_data_paths[0] (a/*.jsonl)", "data.train_data_paths[1] (b/*.jsonl)"),
        sources=(0, 0),
        source_names=("data",),
        weights=(),
        weigh_by="samples",
        addresses=("tcp://one:5555", "tcp://two:5555"),
        rank=0,
        world_size=1,
        client="c",
        feed=FeedConfig(),
        order=OrderConfig(lanes=4, cell=2),
        global_batch_size=8,
        micro_batch_size=4,
        window=2,
    )
    fleet = Fleet(options, [], LaneShares(options))
    for number in range(2):
        fleet.connected(number, 100.0)
        fleet.heard(number, 100.0)
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            loader=f"l{number}",
            fingerprints={},
            held={"train": [number]},
            missing={},
            num_entries={"train": 2},
            num_samples={"train": 9},
            processor="{}",
        )
        assert fleet.welcome(number, welcome, 100.0) is None
    return fleet


def test_what_a_lost_loader_held_is_named_with_its_path(fleet: Fleet) -> None:
    fleet.lost(1, "the connection broke")
    fleet.heard(0, 119.0)
    text = explain.no_data(fleet, 7, None, 120.0)
    assert "no data for 120 s (trainer.feed.data_deadline_s), 7 tickets unanswered" in text
    assert "held by no ready loader: entry 1, data.train_data_paths[1] (b/*.jsonl)" in text
    assert "that do not answer" not in text
    assert "tcp://one:5555 ready, holds entries [0], last heard of 1.0 s ago" in text
    assert "tcp://two:5555 not connected (the connection broke), last heard of 20.0 s ago" in text
    assert "the run resumes from its last checkpoint" in text
    assert "\n" not in text


def test_what_a_hung_loader_holds_is_named_too(fleet: Fleet) -> None:
    """Its connection stands and it is ready, as far as anybody knows: but it does not answer."""
    fleet.heard(0, 119.0)
    assert fleet.loaders[1].state is State.READY
    text = explain.no_data(fleet, 7, None, 120.0)
    assert "held by loaders that do not answer: entry 1, data.train_data_paths[1] (b/*.jsonl); loaders:" in text
    assert "tcp://two:5555 ready, holds entries [1], last heard of 20.0 s ago" in text


def test_why_a_loader_is_home_to_fewer_lanes_is_said(fleet: Fleet) -> None:
    assert fleet.shares.lower(0, 2, 100.0)
    assert fleet.shares.lower(1, 99, 100.0)
    text = explain.describe(fleet, 100.0)
    assert "last heard of 0.0 s ago, slower than others: home to 1/4 of its lanes; tcp://two" in text
    assert text.endswith("last heard of 0.0 s ago, slower than others: home to no lanes")


def test_a_long_list_of_entries_is_cut(fleet: Fleet) -> None:
    many = tuple(f"part-{number}" for number in range(100))
    fleet.options = CoreOptions(
        **{name: getattr(fleet.options, name) for name in CoreOptions.__dataclass_fields__}
        | {"entries": many, "sources": (0,) * len(many)}
    )
    assert ", part-21 and 78 more" in explain.no_data(fleet, 0, None, 100.0)
