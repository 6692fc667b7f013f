"""For the whole suite, before any test module imports torch."""

from __future__ import annotations

import gc
import os
import platform
import signal
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

from tests.support.started import Started

# Ranks are forked from this process. A thread pool that torch's OpenMP started here would not exist in a rank, which would
# then wait for it for ever; and the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same for tokenizers, which else warns after a fork

# `nohup`, `&` in a script and many CI runners start their commands with SIGINT ignored, and whatever those start inherits it.
# Tests interrupt what they started as a terminal does: with a handler here, all processes below this one have the default.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes examples slowly; that is no finding.
hypothesis.settings.register_profile(
    "stoker", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("stoker")

PROCESS_FOLDERS = [Path(__file__).parent / name for name in ("deploy", "end_to_end")]
"""Nearly each of their tests starts a launcher or a fleet; elsewhere the tests that start a process are marked one by one."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without garbage collection, which took a quarter of its time: it makes half a million objects, and all of them stay.

    They are frozen, so that no later collection looks at them again, and forked ranks share their pages.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those folders, before `-m` selects; files that start processes come first.

    Where several files run at once (`pytest -n`), the long ones are under way early, and the short ones fill the gaps.
    """
    for item in items:
        if any(folder in item.path.parents for folder in PROCESS_FOLDERS):
            item.add_marker(pytest.mark.process)
    with_processes = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in with_processes)  # stable: the order within is kept


def pytest_configure(config: pytest.Config) -> None:
    """Watch what tests start."""
    platform.processor()  # starts `uname -p` once in a process, whichever library asks first
    config.pluginmanager.register(Started(), "started")
