"""The pages for operators say who can read them."""

from __future__ import annotations

import logging
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
