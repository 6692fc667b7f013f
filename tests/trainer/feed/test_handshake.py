"""Monitor events of one connection -> stands, lost, denied: schedules written down as lists."""

from __future__ import annotations

import pytest
import zmq

from trainer.feed.handshake import Connected, Denied, Handshake, Lost

CONNECTED, DISCONNECTED, CLOSED = zmq.EVENT_CONNECTED, zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED
SUCCEEDED, HUNG_UP = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
AUTH, PROTOCOL = zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
MISMATCH = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
ADDRESS = "tcp://10.0.0.7:5555"


def play(handshake: Handshake, *events: int | tuple[int, int]) -> list[Connected | Lost | Denied | None]:
    return [handshake.event(*(event if isinstance(event, tuple) else (event, 0))) for event in events]


def test_a_connection_that_stands_and_breaks() -> None:
    first, stands, broke, gone = play(Handshake(ADDRESS, None), CONNECTED, SUCCEEDED, DISCONNECTED, CLOSED)
    assert isinstance(first, Lost)
    assert "has not spoken ZeroMQ" in first.reason
    assert stands == Connected()
    assert broke == Lost("the connection broke")
    assert gone == Lost("nothing listens there")


def test_a_refused_key_is_named_once_until_something_changes() -> None:
    handshake = Handshake(ADDRESS, "rank")
    _, denied, closing = play(handshake, CONNECTED, (AUTH, 400), DISCONNECTED)
    assert isinstance(denied, Denied)
    assert denied.news
    assert denied.text.startswith(f"the loader at {ADDRESS} refused our key 'rank' (cluster.security.rank_secret)")
    assert closing is None
    again = play(handshake, CONNECTED, (AUTH, 400), DISCONNECTED)
    assert again == [None, Denied(denied.text, news=False), None]
    play(handshake, CONNECTED, SUCCEEDED, DISCONNECTED)
    assert play(handshake, CONNECTED, (AUTH, 400))[1] == denied


@pytest.mark.parametrize(
    ("key_name", "words"), [(None, "it uses CURVE keys and this rank has none"), ("rank", "does not use CURVE")]
)
def test_keys_on_one_side_only(key_name: str | None, words: str) -> None:
    denied = play(Handshake(ADDRESS, key_name), CONNECTED, (PROTOCOL, MISMATCH))[1]
    assert isinstance(denied, Denied)
    assert words in denied.text
    assert ADDRESS in denied.text


def test_one_hang_up_may_be_chance_three_with_a_key_are_the_key() -> None:
    handshake = Handshake(ADDRESS, "rank")
    once, twice, thrice = (
        play(handshake, CONNECTED, HUNG_UP, DISCONNECTED)[1],
        play(handshake, CONNECTED, HUNG_UP, DISCONNECTED)[1],
        play(handshake, CONNECTED, HUNG_UP, DISCONNECTED),
    )
    assert (
        once
        == twice
        == Lost(
            "what listens there hung up on the ZeroMQ handshake: is it a loader's port, and does that loader use keys "
            "(cluster.security)?"
        )
    )
    assert isinstance(thrice[1], Lost)
    assert "loader_key is not the public key of the loader there" in thrice[1].reason
    assert thrice[0] is thrice[2] is None  # the reason stays to be read
    play(handshake, CLOSED)
    assert play(handshake, CONNECTED, HUNG_UP)[1] == once


def test_what_speaks_another_protocol_is_no_matter_of_keys() -> None:
    lost = play(Handshake(ADDRESS, "rank"), CONNECTED, (PROTOCOL, 0x10000001))[1]
    assert lost == Lost("what listens there does not speak ZeroMQ: is it a loader's port?")
