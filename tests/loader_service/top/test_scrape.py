"""`loader-top` asks the programs themselves."""

from __future__ import annotations

from contextlib import closing

import pytest

from loader_service.top.scrape import scrape_all
from stoker_proto.fleet.pages import Page, Pages

METRICS = '# TYPE stoker_loader_info gauge\nstoker_loader_info{version="1"} 1.0\n'


def test_a_proxy_of_the_host_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clusters set it for the way out; a proxy knows no loader."""
    pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with closing(Pages({"/metrics": lambda: Page(200, METRICS)})) as pages, closing(Pages({})) as proxy:
        address = pages.start("127.0.0.1:0", "--metrics")
        monkeypatch.setenv("http_proxy", f"http://{proxy.start('127.0.0.1:0', '--proxy')}")
        [found] = scrape_all([address])
    assert (found.error, found.is_loader) == ("", True)
