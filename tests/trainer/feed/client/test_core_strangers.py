"""The client's state machine: loaders that differ, their keys, and when that ends the run or leaves them out."""

from __future__ import annotations

import dataclasses

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.errors import RefusedError
from stoker_proto.wire.messages import Hello, Lanes, Refuse, Ticket
from tests.trainer.feed.client.core_driver import EXPECTED, CoreDriver, asked
from trainer.feed.client.fleet import State


def test_refusal_names_what_differs() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect(start=False)
    driver.receive(0, Refuse(protocol=PROTOCOL_VERSION, differences=[["codec", "c9", "c1"]]))
    driver.advance()
    assert isinstance(driver.error, RefusedError)
    assert "codec: the loader has c9, this rank c1" in str(driver.error)
    assert "tcp://loader0:5555" in str(driver.error)


def test_a_refusal_cannot_forge_lines_of_the_log() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect(start=False)
    forged = ["codec\nstep 9 loss 0.0", "\x1b[2J", "x" * 1000]
    driver.receive(0, Refuse(protocol=PROTOCOL_VERSION, differences=[forged] * 1000))
    driver.advance()
    assert str(driver.error).isprintable()
    assert r"codec\nstep 9 loss 0.0: the loader has \x1b[2J, this rank xxx" in str(driver.error)
    assert len(str(driver.error)) < 20 * 300


def test_second_loader_that_differs_from_the_first_is_refused() -> None:
    driver = CoreDriver()
    driver.fingerprints[1]["tokenizer"] = "other"
    driver.connect(start=False)
    assert isinstance(driver.error, RefusedError)
    assert "tokenizer: the loader has other, this rank t1" in str(driver.error)


def test_pins_of_a_checkpoint_are_sent_and_held_against_the_loader() -> None:
    driver = CoreDriver(1, fingerprints={"plan": "of the checkpoint"})
    driver.connect(start=False)
    hello = next(message for _, message in driver.sent if isinstance(message, Hello))
    assert hello.fingerprints == {"plan": "of the checkpoint"}
    assert isinstance(driver.error, RefusedError)
    assert "plan: the loader has p1, this rank of the checkpoint" in str(driver.error)


def test_other_protocol_version_is_refused() -> None:
    driver = CoreDriver(1)
    driver.silent = {0}
    driver.connect(start=False)
    driver.receive(0, dataclasses.replace(driver.welcome(0), protocol=PROTOCOL_VERSION + 1))
    driver.advance()
    assert f"protocol: the loader has {PROTOCOL_VERSION + 1}, this rank {PROTOCOL_VERSION}" in str(driver.error)


def test_a_loader_that_comes_later_and_differs_is_left_out() -> None:
    driver = CoreDriver()
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(0)
    driver.core.connected(1, driver.now)
    driver.advance()
    driver.finish()
    assert driver.error is None
    assert "codec: the loader has other, this rank c1" in driver.warnings[0]
    assert asked([pair for pair in driver.sent if isinstance(pair[1], Ticket)]) == {0}  # type: ignore[misc]
    assert driver.keys() == EXPECTED


def wait_for_the_first_validation() -> CoreDriver:
    """The core of a split that is read later: connected at the start, no micro-batch wanted yet, an hour of training gone."""
    driver = CoreDriver().connect(0, start=False)
    driver.core.open(0, driver.now)
    driver.advance()
    driver.core.begin()
    for _ in range(60):
        driver.advance(60.0)
    assert driver.error is None
    return driver


def test_a_loader_that_differs_and_joins_before_the_first_validation_is_left_out() -> None:
    driver = wait_for_the_first_validation()
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(1)
    driver.finish()
    assert driver.error is None
    assert "codec: the loader has other, this rank c1" in driver.warnings[0]
    assert asked([pair for pair in driver.sent if isinstance(pair[1], Ticket)]) == {0}  # type: ignore[misc]
    assert driver.keys() == EXPECTED


def test_keys_that_stop_fitting_before_the_first_validation_leave_the_loader_out() -> None:
    driver = wait_for_the_first_validation()
    driver.core.denied(1, "the loader at B refused our key", driver.now)
    driver.advance()
    assert (driver.error, driver.warnings) == (None, ["the loader at B refused our key"])


def test_a_loader_that_differs_ends_the_start_also_once_the_stream_is_known() -> None:
    """Minutes may pass between the first answer and the first step, and the one that answered first may be the wrong one."""
    driver = CoreDriver().connect(0, start=False)
    driver.core.open(0, driver.now)
    driver.advance(30.0)
    driver.fingerprints[1]["codec"] = "other"
    driver.connect(1, start=False)
    assert isinstance(driver.error, RefusedError)


def test_a_run_that_has_begun_is_still_ended_by_a_difference_from_the_first_loader_of_all() -> None:
    driver = CoreDriver(1, fingerprints={"plan": "of the checkpoint"})
    driver.core.begin()
    driver.connect()
    assert isinstance(driver.error, RefusedError)


def test_keys_that_do_not_fit_end_the_run_at_its_start() -> None:
    driver = CoreDriver(1)
    driver.core.denied(0, "the loader at A refused our key", driver.now)
    driver.advance()
    assert isinstance(driver.error, RefusedError)
    assert str(driver.error) == "the loader at A refused our key"


def test_keys_that_stop_fitting_leave_the_loader_out_until_they_fit_again() -> None:
    driver = CoreDriver(2).connect(0, 1)
    driver.core.lost(1, "the connection broke", driver.now)
    driver.core.denied(1, "the loader at B refused our key", driver.now)
    driver.advance()
    assert driver.error is None
    assert driver.warnings == ["the loader at B refused our key"]
    assert driver.core.fleet.loaders[1].state is State.REFUSED
    driver.connect(1, start=False)
    assert driver.core.fleet.loaders[1].state is State.READY


def test_lanes_that_differ_are_refused() -> None:
    driver = CoreDriver().connect(start=False)
    driver.core.open(0, driver.now)
    driver.advance()
    driver.receive(1, Lanes(split="train", epoch=0, lengths={0: [9, 14, 0, 8]}, starts={0: [0] * 4}, tokens={}))
    driver.advance()
    assert "samples of entry 0, epoch 0: the loader has 31, this rank 30" in str(driver.error)


def test_another_number_of_lanes_or_entries_is_refused() -> None:
    driver = CoreDriver(1).connect(start=False)
    driver.core.open(5, driver.now)
    driver.receive(0, Lanes(split="train", epoch=5, lengths={0: [1, 2]}, starts={0: [0, 0]}, tokens={}))
    driver.advance()
    assert "lanes of entry 0: the loader has 2, this rank 4" in str(driver.error)

    driver = CoreDriver(1, entries=("only.jsonl",), sources=(0,))
    driver.connect(start=False)
    assert "entries of the train data: the loader has 2, this rank 1" in str(driver.error)
