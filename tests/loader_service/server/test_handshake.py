"""What a rank says of itself stands in the log on one line, whatever it is."""

from __future__ import annotations

import logging

import pytest

from loader_service.server.handshake import Handshake
from loader_service.server.served import Served
from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire.messages import Hello, Refuse
from tests.trainer.feed.fake_loader import make_config


def test_a_hello_cannot_forge_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    greeter = Handshake(Served(make_config(["tcp://nobody:1"]), {}, {"order": "ours"}, "{}", {}, "loader"))
    hello = Hello(
        protocol=PROTOCOL_VERSION,
        client="me\n2026-01-01 all is well\x1b[2J",
        rank=0,
        world_size=1,
        fingerprints={"order": "theirs\r\n" + "x" * 1000},
    )
    answer = greeter.answer(hello)
    assert isinstance(answer, Refuse)
    assert answer.differences == [["order", "ours", r"theirs\r\n" + "x" * 187 + "..."]]
    (record,) = caplog.get_records("call")
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert r"refused rank 0 (me\n2026-01-01 all is well\x1b[2J)" in message
    assert message.isprintable()


def test_a_rank_that_asks_again_and_again_hides_no_other_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Each reason has its own count of lines in the log."""
    known = {"dialogue": "ours", "order": "ours"}
    greeter = Handshake(Served(make_config(["tcp://nobody:1"]), {}, known, "{}", {}, "loader"))

    def ask(name: str) -> None:
        answer = greeter.answer(
            Hello(protocol=PROTOCOL_VERSION, client="me", rank=0, world_size=1, fingerprints={name: "theirs"})
        )
        assert isinstance(answer, Refuse)

    for _ in range(50):
        ask("dialogue")
    ask("order")
    assert greeter.refused == 51
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert len(messages) == 20
    assert "differs in [['order'" in messages[-1]
