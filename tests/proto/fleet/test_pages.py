"""The pages for operators say who can read them."""

from __future__ import annotations

import logging
import re
import socket
import struct
import time
from contextlib import closing

import pytest

from stoker_proto.errors import ConfigError
from stoker_proto.fleet.pages import Page, Pages


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_pages_on_this_machine_need_no_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Pages({"/metrics": lambda: Page(200, "")})) as pages:
        pages.start(f"{host}:0", "--metrics")
    assert caplog.records == []


def test_pages_beyond_loopback_are_served_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Pages({"/livez": lambda: Page(200, ""), "/readyz": lambda: Page(200, "")})) as pages:
        port = pages.start("0.0.0.0:0", "--health").removeprefix("0.0.0.0:")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            "--health 0.0.0.0:0: any machine that reaches this port can read /livez and /readyz: these pages need no key and "
            f"show no data; 127.0.0.1:{port} would keep them on this machine",
        )
    ]


def test_what_can_be_no_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--metrics a\.\.b:9100: 'a\.\.b' is no name of a host: label empty"):
        Pages({}).start("a..b:9100", "--metrics")


def test_a_health_check_that_ends_with_a_reset_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """As load balancers do that only open a connection. Whoever reaches the port could fill the disk."""
    caplog.set_level(logging.DEBUG)
    with closing(Pages({"/livez": lambda: Page(200, "")})) as pages:
        host, _, port = pages.start("127.0.0.1:0", "--health").rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
        end = time.monotonic() + 60
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.01)
    [record] = caplog.records
    assert (record.levelno, record.exc_info) == (logging.DEBUG, None)
    assert re.fullmatch(r"a connection from .* ended: .* Connection reset by peer", record.getMessage())
