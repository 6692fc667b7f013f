"""A process that was started with SIGINT ignored, as behind `&` in a script, still ends by it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from loader_service.cli import _guarded
from stoker_proto.host.interrupts import heed_interrupts
from trainer.bench import command as bench


@pytest.fixture
def _ignored() -> Iterator[None]:
    """SIGINT is ignored when the test begins."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ignored")
def test_it_raises_where_it_was_ignored() -> None:
    heed_interrupts()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("_ignored")
def test_a_handler_stays() -> None:
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    heed_interrupts()
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT]


@pytest.mark.usefixtures("_ignored")
def test_the_loaders_commands_end_with_130() -> None:
    assert _guarded("loader-prepare", lambda: signal.raise_signal(signal.SIGINT)) == 130


@pytest.mark.usefixtures("_ignored")
def test_the_bench_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_config", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        bench.main(["--config", "unused.yaml"])
    assert ended.value.code == 130
