"""Which passes are asked of the loaders for an epoch of the run, and what the stream is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_proto.errors import ConfigError, RefusedError
from stoker_proto.order.stream import Pass
from stoker_proto.wire.messages import Lanes
from tests.trainer.feed.client.core_driver import make_options
from tests.trainer.feed.fake_loader import make_config
from trainer.checkpoints.state import Checkpoint, Cursor, check_resumable, state_of_run
from trainer.feed.client.epochs import Epochs
from trainer.feed.client.options import CoreOptions

LENGTHS = {0: [6, 4, 4, 6], 1: [2, 3, 5, 0], 2: [3, 2, 0, 0]}  # 20 and 10 samples of source 0, 5 of source 1
TOKENS = {0: 2000, 1: 1000, 2: 125}  # rows of 100 and of 25 tokens


def options(**more: object) -> CoreOptions:
    values: dict[str, object] = {
        "entries": ("a", "b", "c"),
        "sources": (0, 0, 1),
        "source_names": ("robots", "chats"),
        **more,
    }
    return make_options(1, **values)


def answer(epochs: Epochs, *passes: Pass, tokens: dict[int, int] | None = None) -> None:
    for one in passes:
        message = Lanes(
            split="train",
            epoch=one.number,
            lengths={one.entry: LENGTHS[one.entry]},
            starts={one.entry: [0] * 4},
            tokens=tokens or {},
        )
        assert epochs.take(message) == []


def test_without_weights_an_epoch_is_one_pass_over_everything() -> None:
    epochs = Epochs(options())
    epochs.open(3)
    assert epochs.wanted == {Pass(3, 0), Pass(3, 1), Pass(3, 2)}
    answer(epochs, Pass(3, 0), Pass(3, 1))
    assert epochs.complete() == []
    answer(epochs, Pass(3, 2))
    assert epochs.complete() == [3]
    assert epochs.complete() == []
    opened = epochs.opened(3)
    assert (opened.num_samples, opened.source_samples, opened.pass_samples) == (35, (30, 5), (30, 5))
    assert {run.epoch for run in epochs.orders[3].runs(0, 35)} == {3}


def test_with_weights_pass_0_comes_first_and_then_what_the_rates_say() -> None:
    epochs = Epochs(options(weights=(3.0, 1.0)))  # 30 of robots, 10 of chats: two passes over these
    epochs.open(1)
    assert epochs.wanted == {Pass(0, 0), Pass(0, 1), Pass(0, 2)}
    answer(epochs, *epochs.wanted)
    assert epochs.complete() == []
    assert epochs.wanted == {Pass(1, 0), Pass(1, 1), Pass(2, 2), Pass(3, 2)}
    answer(epochs, *epochs.wanted)
    assert epochs.complete() == [1]
    opened = epochs.opened(1)
    assert (opened.num_samples, opened.source_samples, opened.pass_samples) == (40, (30, 10), (30, 5))
    chats = [(run.epoch, run.lane) for run in epochs.orders[1].runs(0, 40) if run.lane >= 8]
    assert {number for number, _ in chats} == {2, 3}


def test_shares_of_tokens_take_the_length_of_rows_into_account() -> None:
    epochs = Epochs(options(weights=(1.0, 1.0), weigh_by="tokens"))
    epochs.open(0)
    answer(epochs, *epochs.wanted, tokens=TOKENS)
    epochs.complete()
    answer(epochs, *epochs.wanted, tokens=TOKENS)
    assert epochs.complete() == [0]
    assert epochs.opened(0).source_samples == (30, 120)


def mixture_of(**more: object) -> dict[str, str]:
    epochs = Epochs(options(weights=(1.0, 1.0), **more))
    assert epochs.fingerprints() == {}
    epochs.open(0)
    answer(epochs, *epochs.wanted, tokens=TOKENS)
    epochs.complete()
    return epochs.fingerprints()


def test_other_rates_are_another_mixture_and_no_checkpoint_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaders estimate tokens from the first good sample: another one, and an epoch has other samples at each place."""
    before = mixture_of(weigh_by="tokens")
    assert before.keys() == {"mixture"}
    assert mixture_of(weigh_by="tokens") == before
    monkeypatch.setitem(TOKENS, 2, 130)
    now = mixture_of(weigh_by="tokens")
    config = make_config(["tcp://nobody:1"])
    checkpoint = Checkpoint(folder=tmp_path, state={**state_of_run(config, 1, 1, Cursor(), before)})
    check_resumable(checkpoint, config, 1, before)
    with pytest.raises(RefusedError, match=r"another meaning of it \(mixture \w+ -> \w+\)"):
        check_resumable(checkpoint, config, 1, now)


def test_without_weights_there_is_no_mixture_to_keep() -> None:
    epochs = Epochs(options())
    epochs.open(0)
    answer(epochs, *epochs.wanted)
    epochs.complete()
    assert epochs.fingerprints() == {}


def test_a_loader_that_counted_other_tokens_is_told_so() -> None:
    epochs = Epochs(options(weights=(1.0, 1.0), weigh_by="tokens"))
    epochs.open(0)
    answer(epochs, *epochs.wanted, tokens={0: 2000, 1: 1000, 2: 125})
    other = Lanes(split="train", epoch=0, lengths={1: LENGTHS[1]}, starts={1: [0] * 4}, tokens={1: 1001})
    assert epochs.take(other) == [["tokens of entry 1", "1001", "1000"]]


@pytest.mark.parametrize(
    ("tokens", "named"),
    [({0: 2000, 1: 1000}, "c of source chats"), ({0: 2000, 2: 125}, "b of source robots")],
    ids=["of a source", "of an entry beside others"],
)
def test_shares_of_tokens_that_nobody_counted_are_refused(tokens: dict[int, int], named: str) -> None:
    epochs = Epochs(options(weights=(1.0, 1.0), weigh_by="tokens"))
    epochs.open(0)
    answer(epochs, *epochs.wanted, tokens=tokens)
    with pytest.raises(ConfigError, match=f"the loaders cannot say how many {named} has"):
        epochs.complete()
    assert epochs.orders == {}


def test_what_is_closed_is_forgotten_and_asked_for_anew() -> None:
    epochs = Epochs(options())
    for epoch in (0, 1):
        epochs.open(epoch)
        answer(epochs, *(Pass(epoch, entry) for entry in range(3)))
    assert epochs.complete() == [0, 1]
    epochs.close_except({1})
    assert list(epochs.orders) == [1]
    assert epochs.wanted == {Pass(1, entry) for entry in range(3)}
    epochs.open(0)
    assert epochs.complete() == []


def test_lanes_that_nobody_wanted_are_not_kept() -> None:
    epochs = Epochs(options())
    answer(epochs, *(Pass(7, entry) for entry in range(3)))
    epochs.open(7)
    assert epochs.complete() == []
