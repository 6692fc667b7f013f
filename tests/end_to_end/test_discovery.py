"""Loaders that join and leave a run, found by a file and by a name."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from stoker_proto.errors import DeadlineError
from tests.end_to_end.fleet import pull, serving, write_config, write_demonstrations


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("discovery")
    return write_config(folder, model, [write_demonstrations(folder / "demos", [9] * 30)])


def test_a_fleet_that_is_replaced_during_the_run(config: Path, tmp_path: Path) -> None:
    """The file names one loader, then another; the first is killed. Nobody restarts the rank, and it gets the same batches."""
    listed = tmp_path / "loaders.txt"

    def list_loaders(*addresses: str) -> None:
        new = tmp_path / "new"
        new.write_text("".join(f"{address}\n" for address in addresses))
        new.replace(listed)

    with ExitStack() as stack:
        first = stack.enter_context(serving(config))
        expected = pull(config, [first.address])
        list_loaders(first.address)
        second = stack.enter_context(serving(config))

        def replace_the_fleet(step: int) -> None:
            if step == 3:
                list_loaders(second.address)
                first.end(signal.SIGKILL)

        found = pull(config, [f"file:{listed}"], "trainer.feed.discovery_s=0.1", on_step=replace_the_fleet)
    assert found.steps == expected.steps
    assert len(found.steps) == 34


def test_a_name(config: Path) -> None:
    """A name that is found, beside one that is not: the run needs only loaders that together hold all the data."""
    with serving(config) as loader:
        port = loader.address.rpartition(":")[2]
        expected = pull(config, [loader.address])
        assert pull(config, [f"dns://localhost:{port}", "dns://no.such.name.invalid:1"]).steps == expected.steps


def test_a_name_without_addresses_ends_the_start_with_the_reason(config: Path) -> None:
    with pytest.raises(DeadlineError, match=r"loaders: dns://no\.such\.name\.invalid:5555 names none now \(.+\)"):
        pull(config, ["dns://no.such.name.invalid:5555"], "trainer.feed.connect_deadline_s=3")
